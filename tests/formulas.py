"""The optimizers' formulas, written once more in the plainest way: one step of one whole tensor."""

import functools
import itertools
import math

import torch


def sgd(p, g, state, options, step):
    """SGD's new parameter from the gradient g, which holds weight decay already."""
    momentum = options["momentum"]
    if momentum:
        before = state.get("momentum_buffer")
        state["momentum_buffer"] = g if before is None else momentum * before + (1 - options["dampening"]) * g
        g = g + momentum * state["momentum_buffer"] if options["nesterov"] else state["momentum_buffer"]
    return p - options["lr"] * g


def moments(p, g, state, options):
    """Moves the averages of the gradient and its square on; returns both."""
    (beta1, beta2), zero = options["betas"], torch.zeros_like(p)
    state["exp_avg"] = beta1 * state.get("exp_avg", zero) + (1 - beta1) * g
    state["exp_avg_sq"] = beta2 * state.get("exp_avg_sq", zero) + (1 - beta2) * g * g
    return state["exp_avg"], state["exp_avg_sq"]


def corrections(options, step):
    """What the averages are divided by, since they began at 0."""
    beta1, beta2 = options["betas"]
    return (1 - beta1**step, 1 - beta2**step) if options["bias_correction"] else (1.0, 1.0)


def adam(p, g, state, options, step):
    """Adam's new parameter; both of Adam and AdamW."""
    m, v = moments(p, g, state, options)
    if options["amsgrad"]:
        v = state["max_exp_avg_sq"] = torch.maximum(state.get("max_exp_avg_sq", torch.zeros_like(p)), v)
    correction1, correction2 = corrections(options, step)
    return p - options["lr"] * (m / correction1) / ((v / correction2).sqrt() + options["eps"])


def adagrad(p, g, state, options, step):
    """Adagrad's new parameter."""
    state["sum"] = state.get("sum", torch.full_like(p, options["initial_accumulator_value"])) + g * g
    return p - options["lr"] / (1 + (step - 1) * options["lr_decay"]) * g / (state["sum"].sqrt() + options["eps"])


def square_average(p, g, state, share):
    state["square_avg"] = share * state.get("square_avg", torch.zeros_like(p)) + (1 - share) * g * g
    return state["square_avg"]


def rmsprop(p, g, state, options, step):
    """RMSprop's new parameter."""
    alpha, zero = options["alpha"], torch.zeros_like(p)
    variance = square_average(p, g, state, alpha)
    if options["centered"]:
        state["grad_avg"] = alpha * state.get("grad_avg", zero) + (1 - alpha) * g
        variance = variance - state["grad_avg"].square()
    change = g / (variance.sqrt() + options["eps"])
    if options["momentum"]:
        state["momentum_buffer"] = change = options["momentum"] * state.get("momentum_buffer", zero) + change
    return p - options["lr"] * change


def adadelta(p, g, state, options, step):
    """Adadelta's new parameter."""
    before, rho = state.get("acc_delta", torch.zeros_like(p)), options["rho"]
    change = g * ((before + options["eps"]) / (square_average(p, g, state, rho) + options["eps"])).sqrt()
    state["acc_delta"] = rho * before + (1 - rho) * change * change
    return p - options["lr"] * change


def adamax(p, g, state, options, step):
    """Adamax's new parameter."""
    (beta1, beta2), zero = options["betas"], torch.zeros_like(p)
    state["exp_avg"] = beta1 * state.get("exp_avg", zero) + (1 - beta1) * g
    state["exp_inf"] = torch.maximum(beta2 * state.get("exp_inf", zero), g.abs() + options["eps"])
    return p - options["lr"] * state["exp_avg"] / (1 - beta1**step) / state["exp_inf"]


def nadam(p, g, state, options, step):
    """NAdam's new parameter. The product of momenta is a float32 number, as torch has it."""
    (beta1, beta2), (m, v) = options["betas"], moments(p, g, state, options)
    now, then = (beta1 * (1 - 0.96 ** (t * options["momentum_decay"]) / 2) for t in (step, step + 1))
    state["mu_product"] = state.get("mu_product", torch.ones(())) * now
    product = state["mu_product"].item()
    ahead = (1 - now) * g / (1 - product) + then * m / (1 - product * then)
    return p - options["lr"] * ahead / ((v / (1 - beta2**step)).sqrt() + options["eps"])


def adafactor(p, g, state, options, step):
    """Adafactor's new parameter, without its weight decay. An eps1 of None is float32's."""
    eps1, eps2 = 2**-23 if options["eps"][0] is None else options["eps"][0], options["eps"][1]
    weight = step ** options["beta2_decay"]

    def moved(name, mean):
        before = state.get(name, torch.zeros_like(mean))
        state[name] = before + weight * (mean - before)
        return state[name]

    def mean(dim):
        return g.square().sum(dim, keepdim=True) / max(1, g.shape[dim])

    if p.dim() > 1:
        row = moved("row_var", mean(-1))
        v = row * moved("col_var", mean(-2)) / row.mean(-2, keepdim=True).clamp(min=eps1)
    else:
        v = moved("variance", g * g)
    u = g / v.clamp(min=eps1**2).sqrt()
    size = max(eps2, p.square().mean().sqrt().item()) * min(float(options["lr"]), step**-0.5)
    return p - size / max(1.0, u.square().mean().sqrt().item() / options["d"]) * u


def asgd(p, g, state, options, step):
    """ASGD's new parameter, by the step size that the step before has left."""
    return p - state.get("eta", torch.tensor(float(options["lr"]))) * g


def asgd_factor(state, options):
    """What ASGD multiplies its parameter by first."""
    return 1 - options["lambd"] * state.get("eta", torch.tensor(float(options["lr"]))).item()


def asgd_average(p, state, options, step):
    """What ASGD makes of its new parameter, and the step size and the weight in the average of the next step."""
    lr, mu, ax = float(options["lr"]), state.get("mu", torch.ones(())), state.get("ax", torch.zeros_like(p))
    state["ax"] = p.clone() if mu == 1 else ax + mu * (p - ax)
    state["eta"] = torch.tensor(lr / (1 + options["lambd"] * lr * step) ** options["alpha"])
    state["mu"] = torch.tensor(1 / max(1.0, step - options["t0"]))


def novograd(p, g, state, options, step):
    """NovoGrad's new parameter."""
    (beta1, beta2), before = options["betas"], state.get("exp_avg_sq", torch.zeros(())).double()
    squares = g.square().sum()
    state["exp_avg_sq"] = (squares if before == 0 else beta2 * before + (1 - beta2) * squares).to(p.dtype)
    divisor = state["exp_avg_sq"]
    if options["amsgrad"]:
        divisor = torch.maximum(state.get("max_exp_avg_sq", torch.zeros_like(divisor)), divisor)
        state["max_exp_avg_sq"] = divisor
    u = g / (divisor.sqrt() + options["eps"])
    if not options["decoupled_decay"]:
        u = u + options["weight_decay"] * p
    share = 1 - beta1 if options["grad_averaging"] else 1.0
    state["exp_avg"] = beta1 * state.get("exp_avg", torch.zeros_like(p)) + share * u
    return p - options["lr"] * state["exp_avg"]


def radam(p, g, state, options, step):
    """RAdam's new parameter."""
    (beta1, beta2), (m, v) = options["betas"], moments(p, g, state, options)
    change = m / (1 - beta1**step)
    longest = 2 / (1 - beta2) - 1
    length = longest - 2 * step * beta2**step / (1 - beta2**step)
    if length > 5:
        share = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
        change = change * (share * (1 - beta2**step)) ** 0.5 / (v.sqrt() + options["eps"])
    return p - options["lr"] * change


def adan(p, g, state, options, step):
    """Adan's new parameter."""
    (beta1, beta2, beta3), before = options["betas"], state.get("neg_pre_grad", -g)
    new = {
        "exp_avg": (beta1, g),
        "exp_avg_diff": (beta2, g + before),
        "exp_avg_sq": (beta3, (g + beta2 * (g + before)) ** 2),
    }
    for name, (beta, value) in new.items():
        state[name] = beta * state.get(name, torch.zeros_like(p)) + (1 - beta) * value
    state["neg_pre_grad"] = -g
    m, d, n = (state[name] / (1 - beta**step) for name, (beta, _) in new.items())
    change = options["lr"] * (m + beta2 * d) / (n.sqrt() + options["eps"])
    return p - change if options["no_prox"] else (p - change) / (1 + options["lr"] * options["weight_decay"])


def ademamix(p, g, state, options, step):
    """AdEMAMix's new parameter."""
    (beta1, beta2, beta3), zero = options["betas"], torch.zeros_like(p)

    def steps_to_half(beta):
        return math.log(0.5) / math.log(beta + 1e-8) - 1

    if step < options["beta3_warmup"]:
        share = step / options["beta3_warmup"]
        beta3 = 0.5 ** (1 / ((1 - share) * steps_to_half(beta1) + share * steps_to_half(beta3) + 1))
    state["exp_avg_fast"] = beta1 * state.get("exp_avg_fast", zero) + (1 - beta1) * g
    state["exp_avg_slow"] = beta3 * state.get("exp_avg_slow", zero) + (1 - beta3) * g
    state["exp_avg_sq"] = beta2 * state.get("exp_avg_sq", zero) + (1 - beta2) * g * g
    alpha = options["alpha"] * min(1.0, step / max(options["alpha_warmup"], 1))
    change = state["exp_avg_fast"] / (1 - beta1**step) + alpha * state["exp_avg_slow"]
    return p - options["lr"] * change / ((state["exp_avg_sq"] / (1 - beta2**step)).sqrt() + options["eps"])


def rprop(p, g, state, options, step):
    """Rprop's new parameter."""
    (slower, faster), (smallest, largest) = options["etas"], options["step_sizes"]
    size = state.get("step_size", torch.full_like(p, options["lr"]))
    agreement = g.sign() * state.get("prev", torch.zeros_like(p)).sign()
    size = torch.where(agreement > 0, size * faster, torch.where(agreement < 0, size * slower, size))
    state["step_size"] = size = size.clamp(smallest, largest)
    state["prev"] = g = torch.where(agreement < 0, 0.0, g)
    return p - g.sign() * size


def lion(p, g, state, options, step):
    """Lion's new parameter."""
    (beta1, beta2), m = options["betas"], state.get("exp_avg", torch.zeros_like(p))
    state["exp_avg"] = m * beta2 + g * (1 - beta2)
    return p - sign(m * beta1 + g * (1 - beta1)) * options["lr"]


def trust(length, by):
    """The norm of a tensor by that of another; 1 if either is 0."""
    return length / by if length != 0 and by != 0 else 1.0


def lamb(p, g, state, options, step):
    """LAMB's new parameter."""
    (beta1, _), before = options["betas"], state.get("exp_avg", torch.zeros_like(p))
    m, v = moments(p, g, state, options)
    if not options["grad_averaging"]:
        m = state["exp_avg"] = beta1 * before + g
    correction1, correction2 = corrections(options, step)
    u = m / correction1 / ((v / correction2).sqrt() + options["eps"])
    if not options["decoupled_decay"]:
        u = u + options["weight_decay"] * p
    ratio = trust(p.norm(), u.norm()) if options["weight_decay"] != 0 or options["always_adapt"] else 1.0
    return p - options["lr"] * (min(ratio, 1.0) if options["trust_clip"] else ratio) * u


def lars(p, g, state, options, step):
    """LARS's new parameter: that of SGD, from a gradient that is scaled."""
    ratio, decay = 1.0, options["weight_decay"]
    if decay != 0 or options["always_adapt"]:
        by = g.norm() + decay * p.norm() + options["eps"] if g.norm() != 0 else 0.0
        ratio = trust(options["trust_coeff"] * p.norm(), by)
        ratio = min(ratio / options["lr"], 1.0) if options["trust_clip"] else ratio
    return sgd(p, ratio * (g + decay * p), state, options, step)


def schedule_free(p, u, state, options, step, momentum, rates):
    """y's new value from the update u and the learning rates of the steps so far; x is told from y and z."""
    z = state.get("z", p)
    x = (p - (1 - momentum) * z) / momentum
    largest = itertools.accumulate(rates, max)
    weights = [(i + 1) ** options["r"] * lr ** options["weight_lr_power"] for i, lr in enumerate(largest)]
    c = weights[-1] / sum(weights) if any(weights) else 0.0
    state["z"] = z = z - rates[-1] * (u + options["weight_decay"] * p)
    return (1 - momentum) * z + momentum * ((1 - c) * x + c * z)


def warmed(options, steps):
    """The learning rates of the first steps."""
    return [float(options["lr"]) * min(1.0, i / max(options["warmup_steps"], 1)) for i in range(1, steps + 1)]


def normalized(g, state, options, step):
    """The gradient by the root of its average square."""
    beta2 = options["betas"][1]
    state["exp_avg_sq"] = v = beta2 * state.get("exp_avg_sq", torch.zeros_like(g)) + (1 - beta2) * g * g
    return g / ((v / (1 - beta2**step)).sqrt() + options["eps"])


def adamw_schedule_free(p, g, state, options, step):
    """AdamWScheduleFree's new parameter, y."""
    u = normalized(g, state, options, step)
    return schedule_free(p, u, state, options, step, options["betas"][0], warmed(options, step))


def radam_schedule_free(p, g, state, options, step):
    """RAdamScheduleFree's new parameter, y."""
    (beta1, beta2), rates = options["betas"], []
    longest = 2 / (1 - beta2) - 1
    for i in range(1, step + 1):
        n = longest - 2 * i * beta2**i / (1 - beta2**i)
        share = 0.0 if options["silent_sgd_phase"] else 1.0
        if n > 4:
            share = ((n - 4) * (n - 2) * longest / ((longest - 4) * (longest - 2) * n)) ** 0.5
        rates.append(float(options["lr"]) * share)
    u = normalized(g, state, options, step)
    return schedule_free(p, u if n > 4 else g, state, options, step, beta1, rates)


def sgd_schedule_free(p, g, state, options, step):
    """SGDScheduleFree's new parameter, y."""
    return schedule_free(p, g, state, options, step, options["momentum"], warmed(options, step))


def prodigy_numbers(operands, o, numbers):
    """What Prodigy's numbers are after a step of these (parameter, gradient, state): `numbers` is what they were."""
    (beta1, beta2), d0, k = o["betas"], o["d0"], numbers.get("k", 0)
    d, d_max = numbers.get("d", d0), numbers.get("d_max", d0)
    beta3 = beta2**0.5 if o["beta3"] is None else o["beta3"]
    correction = (1 - beta2 ** (k + 1)) ** 0.5 / (1 - beta1 ** (k + 1)) if o["use_bias_correction"] else 1.0
    rate = d * correction
    numerator, denominator = beta3 * numbers.get("d_numerator", 0.0), 0.0
    for p, g, state in operands:
        way = (state.setdefault("p0", p.clone()) - p) * rate * float(o["lr"])
        numerator += d / d0 * torch.dot(g.flatten(), way.flatten()).item()
        share = d if o["safeguard_warmup"] else rate * float(o["lr"])
        state["s"] = beta3 * state.get("s", torch.zeros_like(p)) + d / d0 * share * g
        denominator += state["s"].abs().sum().item()
    found = {"d_before": d, "rate": rate, "d": d, "d_max": d_max, "d_numerator": numerator, "k": k + 1}
    if denominator != 0:
        estimate = o["d_coef"] * numerator / denominator
        grown = max(d, estimate) if d == d0 else d
        found["d_max"] = max(d_max, estimate)
        found["d"] = min(found["d_max"], grown * o["growth_rate"])
    return found


def prodigy(p, g, state, options, step):
    """Prodigy's new parameter, once `prodigy_numbers` has moved s on."""
    (beta1, beta2), d, zero = options["betas"], options["d_before"], torch.zeros_like(p)
    if beta1:
        state["exp_avg"] = beta1 * state.get("exp_avg", zero) + (1 - beta1) * d * g
    m = state["exp_avg"] if beta1 else options["d"] * g
    state["exp_avg_sq"] = beta2 * state.get("exp_avg_sq", zero) + (1 - beta2) * (d * g) ** 2
    return p - options["lr"] * options["rate"] * m / (state["exp_avg_sq"].sqrt() + options["d"] * options["eps"])


#: Options that decouple weight decay from the gradient.
DECOUPLING = ("decoupled_weight_decay", "no_prox", "decoupled_decay", "decouple")
#: What the last formula has taken the sign of.
signed: list[torch.Tensor] = []


def sign(x):
    """For formulas: 1, -1 or 0, and NaN for NaN. The judge takes either sign where x is within rounding of 0."""
    signed.append(x)
    return torch.where(x.isnan(), x, x.sign())


def take_undecided(eps: float, gradient: torch.Tensor) -> torch.Tensor | None:
    """Where the last formula's signs are a matter of how arithmetic with this unit of rounding is ordered, if any are.

    An x of exactly 0 where the gradient is 0 is none of these: nothing has been rounded.
    """
    moved = gradient != 0
    near = [((x != 0) | moved) & (x.abs() <= 8 * eps * x.square().mean().sqrt()) for x in signed]
    signed.clear()
    return functools.reduce(torch.logical_or, near) if near else None


def number(value):
    return None if value is None else float(value)


def all_options(row, options):
    o = {**row.defaults, **options}
    return {name: tuple(map(number, value)) if isinstance(value, tuple) else value for name, value in o.items()}


def is_decoupled(row, o):
    return next((o[name] for name in DECOUPLING if name in o), row.decoupled)


def felt(row, o, p, g):
    """The gradient that the formula is given."""
    if o["maximize"]:
        g = -g
    if not is_decoupled(row, o) and not row.decays_itself:
        g = g + o.get("weight_decay", 0.0) * p
    return g if o["l1_proximal"] else g + o["l1"] * p.sign()


def numbers_after(row, operands, options, numbers):
    """What a row's numbers that are not of one parameter are, before `formula_step` of each (parameter, gradient,
    state); they are options of it."""
    if row.in_common is None:
        return {}
    o = all_options(row, options)
    return row.in_common([(p, felt(row, o, p, g), state) for p, g, state in operands], o, numbers)


def options_now(row, operands, options, optimizer):
    """Options for `formula_step` of these parameters, from where this optimizer is before its step."""
    numbers = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
    return {**options, **numbers_after(row, operands, options, numbers)}


def formula_step(row, p, g, state, options, step):
    """The whole of a step for one parameter, by the formula; returns the new parameter and changes `state`."""
    signed.clear()
    o = all_options(row, options)
    decoupled = is_decoupled(row, o)
    decays_itself = row.decays_itself and not decoupled
    g = felt(row, o, p, g)
    lr = o["lr"] * o.get("rate", 1.0)
    kept = p * (1 - lr * o["weight_decay"]) if decoupled else p
    if row.factor is not None:
        kept = kept * row.factor(state, o)
    if o["cautious"] or o["cautious_weight_decay"]:
        # From 0, of which nothing is lost to rounding, where the update does not depend on the parameter.
        by_parameter = (
            row.averages or row.ours._reads_parameter or (decays_itself and (row.has_sums or o["weight_decay"] != 0))
        )
        change = p - row.formula(p, g, state, o, step) if by_parameter else -row.formula(0 * p, g, state, o, step)
        # A change of exactly 0 is the formula's own: where Rprop waits, it is 0 in any arithmetic.
        signed.extend((torch.where(change == 0, change.square().mean().sqrt(), change), g))
        if o["cautious"] and p.numel():
            agrees = (change * g > 0).double()
            change = change * agrees / max(agrees.mean().item(), 1e-3)
        if o["cautious_weight_decay"]:
            kept = torch.where(change * p >= 0, kept, p)
        p = kept - change
    elif row.ours._reads_parameter:
        p = kept - (p - row.formula(p, g, state, o, step))
    else:
        p = row.formula(kept, g, state, o, step)
    if row.settle is not None:
        row.settle(p, state, o, step)
    if o["l1_proximal"]:
        p = p.sign() * (p.abs() - lr * o["l1"]).clamp(min=0)
    return p


class FormulaOptimizer:
    """The formula as an optimizer. `undecided` gathers where its signs are a matter of rounding to `eps`."""

    eps = 0.0

    def __init__(self, row, params, options):
        self.row, self.options, self.params = row, options, list(params)
        self.state = {p: {} for p in self.params}
        self.undecided = {p: torch.zeros_like(p, dtype=torch.bool) for p in self.params}
        self.steps, self.numbers = 0, {}

    @torch.no_grad()
    def step(self):
        self.steps += 1
        operands = [(p, p.grad, self.state[p]) for p in self.params]
        self.numbers = numbers_after(self.row, operands, self.options, self.numbers)
        options = {**self.options, **self.numbers}
        for p in self.params:
            p.copy_(formula_step(self.row, p.clone(), p.grad, self.state[p], options, self.steps))
            if (undecided := take_undecided(self.eps, p.grad)) is not None:
                self.undecided[p] |= undecided


class SeparatePasses:
    """A plain optimizer, with a pass before it that clips and two after it."""

    def __init__(self, plain, params, max_grad_norm=None, ema_decay=None, ema_warmup=False, zero_grad=None):
        self.plain, self.params = plain, list(params)
        self.limit, self.decay, self.warmup, self.clears = max_grad_norm, ema_decay, ema_warmup, zero_grad is not None
        self.steps, self.product, self.norm = 0, 1.0, None
        wide = [torch.float64 if p.dtype == torch.float64 else torch.float32 for p in params]
        self.averages = [torch.zeros_like(p, dtype=dtype) for p, dtype in zip(self.params, wide, strict=True)]

    def noise(self, step):
        """What is added to each parameter in a step."""
        return [torch.zeros_like(p) for p in self.params]

    def store(self):
        """Where parameters are rounded, before their average takes them in."""

    @property
    def state(self):
        held = {p: dict(self.plain.state[p]) for p in self.params}
        if self.decay is not None:
            for p, average in zip(self.params, self.averages, strict=True):
                held[p]["ema"] = average
        return held

    @torch.no_grad()
    def step(self):
        if self.limit is not None:
            self.norm = torch.stack([p.grad.double().square().sum() for p in self.params]).sum().sqrt()
            for p in self.params:
                p.grad.mul_((self.limit / (self.norm + 1e-6)).clamp(max=1))
        self.plain.step()
        self.steps += 1
        for p, noise in zip(self.params, self.noise(self.steps), strict=True):
            p.add_(noise)
        self.store()
        if self.decay is not None:
            decay = min(self.decay, self.steps / (9 + self.steps)) if self.warmup else self.decay
            self.product *= decay
            for p, average in zip(self.params, self.averages, strict=True):
                average.add_((p.to(average.dtype) - average) * ((1 - decay) / (1 - self.product)))
        if self.clears:
            for p in self.params:
                p.grad.zero_()
