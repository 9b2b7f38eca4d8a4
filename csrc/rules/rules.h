// Every rule, by name: the one list that a new optimizer is added to.
#pragma once

#include "rules/adadelta.h"
#include "rules/adafactor.h"
#include "rules/adagrad.h"
#include "rules/adam.h"
#include "rules/adamax.h"
#include "rules/adamschedulefree.h"
#include "rules/adan.h"
#include "rules/ademamix.h"
#include "rules/asgd.h"
#include "rules/lamb.h"
#include "rules/lars.h"
#include "rules/lion.h"
#include "rules/nadam.h"
#include "rules/novograd.h"
#include "rules/prodigy.h"
#include "rules/radam.h"
#include "rules/rmsprop.h"
#include "rules/rprop.h"
#include "rules/sgd.h"
#include "rules/sgdschedulefree.h"

// The programs that test the engines have a list of their own.
#if !defined(TRAINOPT_FOR_EACH_RULE)
#define TRAINOPT_FOR_EACH_RULE(DO) \
  DO(Sgd)                          \
  DO(Adam)                         \
  DO(Lion)                         \
  DO(Lamb)                         \
  DO(Lars)                         \
  DO(Prodigy)                      \
  DO(RmsProp)                      \
  DO(Adadelta)                     \
  DO(Adamax)                       \
  DO(RAdam)                        \
  DO(Adan)                         \
  DO(AdEMAMix)                     \
  DO(NAdam)                        \
  DO(Asgd)                         \
  DO(NovoGrad)                     \
  DO(Adagrad)                      \
  DO(Rprop)                        \
  DO(AdamScheduleFree)             \
  DO(SgdScheduleFree)              \
  DO(Adafactor)
#endif
