// Every rule, by name: the one list that a new optimizer is added to.
#pragma once

#include "rules/adam.h"
#include "rules/lamb.h"
#include "rules/lars.h"
#include "rules/lion.h"
#include "rules/sgd.h"

// The tests of the engines have a rule of their own.
#if !defined(TRAINOPT_RULES_OF_TESTS)
#define TRAINOPT_RULES_OF_TESTS(DO)
#endif

#define TRAINOPT_FOR_EACH_RULE(DO) \
  DO(Sgd)                          \
  DO(Adam)                         \
  DO(Lion)                         \
  DO(Lamb)                         \
  DO(Lars)                         \
  TRAINOPT_RULES_OF_TESTS(DO)
