"""What a run trains: the model and the loss, as one module."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from trainopt.training.criterion.callables import bare, has_compiled, inside
from trainopt.training.criterion.counting import Count, is_counted, on_host, samples_in
from trainopt.training.criterion.criterion import Criterion
from trainopt.training.criterion.observing import Observer
from trainopt.training.data import tensors_in
from trainopt.training.distributed import Processes, is_sharded, like
from trainopt.training.gradients import parameters

COMPILED = "_orig_mod."  # what torch.compile puts into the names of what it wraps
StateDict = dict[str, Any]


class Trained(nn.Module):
    """The model and the loss: saved, restored, averaged, moved, wrapped and put into a mode as one.

    It also knows what a batch is for the two: `split` gives its inputs and target, `output` calls the model.

    Args:
        model: the person's, wrapped or not.
        loss, count: as of `trainopt.training.fit`.
        optimizer: whose parameters must be among the model's and the loss's.
        split: `(inputs, target)` of a batch; None for one that is such a pair, or a mapping of the model's arguments.

    Raises:
        ValueError: a parameter of the optimizer is neither the model's nor the loss's.
    """

    model: nn.Module
    criterion: Criterion
    called: nn.Module
    evaluated: nn.Module
    look: Callable[[Any, Any, Tensor], None] | None = None  # sees the output, the target and the mean loss of each

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Any, Any], Any] | None,
        optimizer: torch.optim.Optimizer,
        count: Callable[[Any], Count] | None = None,
        split: Callable[[Any], tuple[Any, Any]] | None = None,
    ) -> None:
        super().__init__()
        self.model = bare(model)
        optimized = parameters(optimizer)
        self.criterion = Criterion(loss, count, optimized, self.model.modules())
        self._check(optimized)
        self.apart: list[Tensor] = []  # parameters whose gradients no wrapper averages over the processes
        self.split: Callable[[Any], tuple[Any, Any]] = split or self._pair
        # What is called, with its wrappers: they must not be registered, or every name would be there twice.
        self.__dict__.update(called=model, evaluated=below_ddp(model))
        if self.criterion.sees_model is None and has_compiled(model):  # no one sees what is computed in there
            self.criterion.sees_model = False

    def _check(self, optimized: list[Tensor]) -> None:
        own = {id(param) for param in self.model.parameters()}
        if not own.intersection(map(id, optimized)):
            raise ValueError("optimizer has no parameter of model: was the model copied after the optimizer was made?")
        own.update(id(param) for param in self.criterion.parameters())
        if strange := [param for param in optimized if id(param) not in own]:
            shapes = ", ".join(str(tuple(param.shape)) for param in strange[:3]) + ", …" * (len(strange) > 3)
            raise ValueError(
                f"optimizer has {len(strange)} of {len(optimized)} parameters that belong to neither model nor loss, of"
                f" shapes {shapes}: they would be trained but not saved. Was a layer replaced after the optimizer was"
                " made?"
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> Trained:
        """A copy of the model and the loss alone: `split` may be a method of anything."""
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        nn.Module.__init__(copied)
        called = copy.deepcopy(self.called, memo)
        copied.model, copied.criterion = bare(called), copy.deepcopy(self.criterion, memo)
        copied.apart = []
        copied.split = copied._pair if self.split == self._pair else self.split
        copied.__dict__.update(called=called, evaluated=below_ddp(called))
        return copied

    # A batch ----------------------------------------------------------------------------------------------------------

    def _pair(self, batch: Any) -> tuple[Any, Any]:
        """A batch that is (inputs, target), or a mapping of the arguments of a model that computes its own loss."""
        if isinstance(batch, tuple | list) and len(batch) == 2:
            return batch[0], batch[1]
        if isinstance(batch, Mapping) and self.criterion.known is None:
            return batch, batch.get("labels", batch)
        size = f" of {len(batch)}" if isinstance(batch, tuple | list) else ""
        hint = ", or loss=None where the model returns its own" if isinstance(batch, Mapping) else ""
        raise ValueError(f"a batch is a {type(batch).__name__}{size}, not (inputs, target): give split={hint}")

    def planned(self, batch: Any) -> Count:
        """What the loss counts in a batch, before it is computed; a number wherever that costs no waiting."""
        count = self.criterion.planned(self.split(batch)[1])
        return on_host(count) if isinstance(count, Tensor) else count

    def output(self, model: nn.Module, inputs: Any) -> Any:
        """The model's output; a tuple or list of inputs are its arguments, a mapping its keyword arguments."""
        if isinstance(inputs, Tensor):
            return model(inputs)
        if isinstance(inputs, tuple | list):
            return model(*inputs)
        return model(**inputs) if isinstance(inputs, Mapping) else model(inputs)

    def loss(self, output: Any, target: Any) -> Tensor:
        """The mean loss of an output."""
        return self.criterion(output, target)[0]

    def measured(self, inputs: Any, target: Any) -> tuple[Any, Tensor, Count | None]:
        """The model's output, its mean loss, and what that counts, None where it is as planned; for an evaluation."""
        return self._measured(self.evaluated, inputs, target)

    def _measured(self, model: nn.Module, inputs: Any, target: Any) -> tuple[Any, Tensor, Count | None]:
        criterion = self.criterion
        if criterion.sees_model is False:
            output = self.output(model, inputs)
            return output, *criterion.forward(output, target)
        observer = Observer(self.model.parameters(), samples_in(target))
        with observer:
            output = self.output(model, inputs)
        observer.start(tensors_in(output))
        return output, *criterion.forward(output, target, observer)

    def forward(self, inputs: Any, target: Any, counts: bool = True) -> tuple[Tensor, Count | None]:
        """The mean loss and what it counts, None where that is as planned. Where it counts nothing the loss is a zero
        that depends on all that is trained: its gradient is zero, but other processes wait for it."""
        if not counts:
            return self._zero(self.output(self.called, inputs)), 0
        output, loss, count = self._measured(self.called, inputs, target)
        if count is not None and not is_counted(count):
            return self._zero(output, loss), 0
        if self.look is not None:
            self.look(output, target, loss)
        return loss, count

    def _zero(self, output: Any, loss: Tensor | None = None) -> Tensor:
        terms = [tensor.sum() for tensor in tensors_in(output) if tensor.is_floating_point() and tensor is not loss]
        terms += [param.sum() for param in self.criterion.parameters() if param.requires_grad]
        return torch.stack([term.to(terms[0]) for term in terms]).sum() * 0.0

    # As one -----------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, StateDict]:
        """The states of the model and of the loss, under the names of the person's own modules; not copied."""
        return {"model": plain_state(self.model), "criterion": plain_state(self.criterion.owned)}

    def load(self, state: Mapping[str, StateDict]) -> None:
        """Takes over what `state` gave, whatever was wrapped then and is now."""
        load_plain(self.model, state["model"])
        if "criterion" in state:  # older files have none
            load_plain(self.criterion.owned, state["criterion"])

    def names(self) -> list[str]:
        """The names of all parameters, in order: the model's as they are there, and the loss's after "loss."."""
        own = [plain_name(name) for name, _ in self.model.named_parameters()]
        prefix = "loss."
        while any(name.startswith(prefix) for name in own):
            prefix = f"_{prefix}"
        others = {id(param): name for name, param in self.criterion.owned.named_parameters()}
        rest = list(self.parameters())[len(own) :]
        return [*own, *(prefix + plain_name(others[id(param)]) for param in rest)]

    def place(self) -> None:
        """Moves what the loss owns to where the model is."""
        devices = {tensor.device for tensor in (*self.model.parameters(), *self.model.buffers())}
        owned = self.criterion.owned
        if len(devices) == 1 and any(part.device not in devices for part in (*owned.parameters(), *owned.buffers())):
            owned.to(devices.pop())

    def begin(self) -> None:
        """Training mode for both; layers that were put into evaluation mode one by one stay in it."""
        if not self.model.training:
            self.called.train()
        if not self.criterion.owned.training:
            self.criterion.owned.train()

    def parallel(self, processes: Processes) -> Callable[..., tuple[Tensor, Count | None]]:
        """What computes the loss so that its backward pass also averages the gradients over the processes.

        A model that averages its own is left to do so; `apart` then has the loss's parameters, which are left over. Two
        DistributedDataParallel modules would not do: they may begin their averages in another order in each process.
        """
        if processes.world == 1:
            return self.forward
        if not self.wrappers() and not is_sharded(self.model):
            return DistributedDataParallel(self)
        own = {id(param) for param in self.model.parameters()}
        self.apart = [each for each in self.criterion.parameters() if each.requires_grad and id(each) not in own]
        return self.forward

    def wrappers(self, *others: Any) -> list[DistributedDataParallel]:
        """The DistributedDataParallel modules round the model, and among the others."""
        found = [*others, self.called]
        while (inner := inside(found[-1])) is not None:
            found.append(inner)
        return [module for module in found if isinstance(module, DistributedDataParallel)]


def planned_by_shape(trained: Trained, targets: Tensor) -> Callable[[Any], Count]:
    """What the loss counts in a batch, from its shape alone where nothing in any target is ignored or weighted."""
    by_shape = trained.criterion.counts_by_shape(targets)
    return trained.planned if by_shape is None else lambda batch: by_shape(trained.split(batch)[1])


def below_ddp(model: nn.Module) -> nn.Module:
    """The model without DistributedDataParallel and what is round that; compiled if it is under it."""
    found, module = model, model
    while (inner := inside(module)) is not None:
        found = inner if isinstance(module, DistributedDataParallel) else found
        module = inner
    return found


@contextmanager
def without_averaging(wrappers: Iterable[DistributedDataParallel]) -> Iterator[None]:
    """Inside, backward passes add gradients up in this process alone."""
    with ExitStack() as stack:
        for wrapper in wrappers:
            stack.enter_context(wrapper.no_sync())
        yield


def plain_name(name: str) -> str:
    """A name of a module's state, also where a part of it is compiled."""
    return name.replace(COMPILED, "")


def plain_state(module: nn.Module) -> StateDict:
    """A module's state under the names that it has when nothing in it is compiled."""
    return {plain_name(name): value for name, value in module.state_dict().items()}


def load_plain(module: nn.Module, state: Mapping[str, Any]) -> None:
    """Loads such a state; whole tensors into the shards of those that are sharded."""
    own = module.state_dict()
    module.load_state_dict({name: like(state[plain_name(name)], value) for name, value in own.items()})
