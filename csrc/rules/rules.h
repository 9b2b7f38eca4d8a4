// Every rule, by name: the one list that a new optimizer is added to.
#pragma once

#include "rules/adam.h"
#include "rules/sgd.h"

#define TRAINOPT_FOR_EACH_RULE(DO) \
  DO(Sgd)                          \
  DO(Adam)
