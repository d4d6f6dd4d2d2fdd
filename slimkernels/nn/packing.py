"""The life cycle of a pack: what a module keeps in eval mode for the kernel that its calls take, and until when."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from slimkernels.kernels.cpu.conv2d import PackedConv2d
from slimkernels.nn.attributes import AttributesInUse
from slimkernels.ops.library import nothing_watches
from slimkernels.tensors import Snapshot, is_plain


class ReadyCall(Protocol):
    """A packed weight that only waits for its input, `slimkernels.kernels.cpu.conv2d.PackedConv2d` for one."""

    @property
    def convs(self) -> tuple[PackedConv2d, ...]:
        """The native convolutions that it runs, in order."""

    def attempt(self, x: Tensor, bias: Tensor | None) -> Tensor | None:
        """The output for images; None where the op has to be asked."""

    def attempt_rows(self, x: Tensor, bias: Tensor | None) -> Tensor | None:
        """The output for rows; None where the op has to be asked."""


class Prepacked(AttributesInUse):
    """A module that keeps a packed copy of its weight, and the call that is ready to run it.

    The pack exists in eval mode only. It is dropped by ``train()``, when the module is moved or loaded, and it is
    passed over (the op then packs by itself, or torch's layers run) when a tensor that it was made from changed since
    or wants a gradient. Writing to the weight in eval mode is legal; call ``prepack()`` afterwards to be fast again,
    and always after an in-place write through ``.data``, which torch does not count. Assigning to ``stride``,
    ``padding``, ``dilation``, ``kind``, ``epilogue`` or ``kernel`` builds the pack anew. A compiled module reads the
    pack of a frozen weight only, and sees writes to that after ``prepack()``; an exported program never sees them.

    The tensors of the pack are buffers outside of the state dict, so they follow a copy of the module.
    """

    kernel: str
    # Names of the pack's buffers, a tuple for each kind of pack that the module may hold. It holds one at most.
    _pack_buffers: tuple[tuple[str, ...], ...]
    _packed_from: tuple[Snapshot, ...] | None
    _prepared: ReadyCall | None

    def _weights(self) -> list[Tensor]:
        """The tensors with the weight's numbers; the first one's device and dtype are the module's."""
        raise NotImplementedError

    def _pack_follows(self) -> list[Tensor]:
        """The tensors that the pack is made from."""
        return self._weights()

    def _make_pack(self) -> Mapping[str, Tensor] | None:
        """The pack of the present weight by names of buffers; None where the calls take no kernel that reads one."""
        raise NotImplementedError

    def _make_call(self) -> ReadyCall | None:
        """The ready call of the pack in the buffers, None where its kernel is called through the op."""
        raise NotImplementedError

    def _isa(self) -> str | None:
        """Instruction set of the CPU kernel that the module's calls take; None where they take none."""
        raise NotImplementedError

    def _init_packing(self) -> None:
        """To be called once all attributes are set."""
        for names in self._pack_buffers:
            for name in names:
                self.register_buffer(name, None, persistent=False)
        self._packed_from = None
        self._prepared = None

    def _held(self) -> tuple[str, ...]:
        """The buffers of the present pack, none where there is no pack."""
        buffers = self._buffers
        return next((names for names in self._pack_buffers if buffers[names[0]] is not None), ())

    def prepack(self) -> None:
        """Builds the prepacked weight of the present values where a kernel of this machine uses one. Eval mode only."""
        self.drop_packed()
        if self.training or any(not is_plain(w) or type(w.data) is not Tensor for w in self._weights()):
            return
        # Torch counts no writes to tensors made in inference mode, and a pack with uncounted writes is checked anew.
        with torch.inference_mode(False), torch.no_grad():
            pack = self._make_pack()
        if pack is not None:
            for name, tensor in pack.items():
                setattr(self, name, tensor)
            self._hold()

    def _hold(self) -> None:
        """Makes the call of the pack in the buffers ready, and notes what was packed, so that writes to it are seen."""
        self._prepared = self._make_call()
        self._packed_from = tuple(Snapshot(weight) for weight in self._weights())

    @property
    def prepacked(self) -> bool:
        """Whether there is a pack of the present weight."""
        return self._pack_is_current()

    def drop_packed(self) -> None:
        """Drops the prepacked weight."""
        for names in self._pack_buffers:
            for name in names:
                setattr(self, name, None)
        self._packed_from = None
        self._prepared = None

    def _pack_is_current(self) -> bool:
        snapshots = self._packed_from
        # A map, because a layer asks this in every call: a generator takes 0.3 us longer.
        return snapshots is not None and all(map(Snapshot.holds, snapshots, self._weights()))

    def _ready(self, x: Tensor) -> ReadyCall | None:
        """The prepared call, where nothing watches the op and the weight is the one that was packed.

        The op's way costs 60 us a layer on a 2.4 GHz Zen 3, this a third: at batch 1 the difference is what the sparse
        arithmetic of a converted VGG-19 takes.
        """
        ready = self._prepared
        # A bias that is parametrized or pruned is no parameter: the op is given what is computed.
        if ready is None or "bias" not in self._parameters:
            return None
        if not nothing_watches(x, self._parameters["bias"], *self._weights()):
            return None
        return ready if self._pack_is_current() else None

    def _packed(self) -> list[Tensor]:
        """What a call of the op is given as its pack."""
        held = self._held()
        if not held:
            return []
        wants_grad = any(w.requires_grad for w in self._weights())
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            # A recorded program cannot see later writes, so only a frozen weight may be read through the pack.
            usable = not wants_grad
        else:
            usable = self._pack_is_current() and not (wants_grad and torch.is_grad_enabled())
        return [self._buffers[name] for name in held] if usable else []  # type: ignore[misc]  # a held one is no None

    def _attributes_changed(self) -> None:
        self.drop_packed()
        if not self.training:
            self.prepack()

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        if mode:
            self.drop_packed()
        elif not self._pack_is_current():
            self.prepack()
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        before = self._weights()[0].device.type, self._weights()[0].dtype
        self.drop_packed()
        super()._apply(fn, recurse)
        if (self._weights()[0].device.type, self._weights()[0].dtype) != before:
            self.kernel = "auto"  # which packs in eval mode
            self._moved()
        elif not self.training:
            self.prepack()
        return self

    def _moved(self) -> None:
        """Called when the module came to another device or dtype."""

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        if not self._pack_is_current():
            held = self._held()
            state["_buffers"] = {k: None if k in held else v for k, v in self._buffers.items()}
        state["_packed_from"] = state["_prepared"] = None
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self._held():
            self._restore()

    def _restore(self) -> None:
        """Takes over a pack that came with a copy of the module, which may have been made on another machine."""
        if self._isa() is None:
            self.drop_packed()
        else:
            self._hold()
