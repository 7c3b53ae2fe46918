"""The tensors of the KV cache: allocated in the layout that the compiled model asks for, copied block by block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ov_phi3.system.core import import_openvino, shared_core

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["CachePort", "KVTensorPool", "cache_ports"]

_ALIGNMENT = 64


@dataclass(frozen=True)
class CachePort:
    """One cache input of the compiled model.

    Attributes:
        name: "key_cache.0", ...
        type: its `openvino.Type`.
        type_name: the same as text: "u8", "f16", ...
        block_shape: shape of one block, as the plugin lays it out: scales included, keys transposed on a GPU.
    """

    name: str
    type: Any
    type_name: str
    block_shape: tuple[int, ...]

    @property
    def block_bytes(self) -> int:
        """Size of one block in bytes."""
        elements = 1
        for length in self.block_shape:
            elements *= length
        return elements * int(self.type.bitwidth) // 8

    def __str__(self) -> str:
        return f"{self.type_name}[{','.join(map(str, self.block_shape))}]"


def cache_ports(compiled: Any) -> list[CachePort]:
    """The cache inputs of a compiled model: keys and values of the first layer, then of the second, and so on."""
    ports = []
    for port in compiled.inputs:
        name = port.get_any_name()
        if name.startswith(("key_cache.", "value_cache.")):
            shape = tuple(int(length.get_length()) for length in list(port.partial_shape)[1:])
            kind, _, layer = name.partition(".")
            type_name = port.element_type.to_string()
            # The port's own type object would keep the compiled model alive.
            type_ = getattr(import_openvino().Type, type_name)
            ports.append((int(layer), kind, CachePort(name, type_, type_name, shape)))
    return [port for _, _, port in sorted(ports, key=lambda entry: entry[:2])]


class KVTensorPool:
    """Cache tensors for a number of blocks, and their contents as bytes.

    On a CPU they are memory of this process, which the system provides when a block is first written. On a GPU they are
    remote tensors of the device's context.

    Args:
        ports: the cache inputs.
        device: an OpenVINO device name.
        num_blocks: number of blocks.
    """

    def __init__(self, ports: Sequence[CachePort], device: str, num_blocks: int) -> None:
        self._ports = tuple(ports)
        self._context = None if device.startswith("CPU") else shared_core().get_default_context(device)
        self.num_blocks = 0
        self.tensors: dict[str, Any] = {}
        self._bytes: list[NDArray[np.uint8]] = []
        self.grow(num_blocks)

    @property
    def block_bytes(self) -> int:
        """Size of one block in all layers, in bytes."""
        return sum(port.block_bytes for port in self._ports)

    def grow(self, num_blocks: int) -> None:
        """Allocate tensors for more blocks and copy the contents of the present ones.

        Raises:
            MemoryError, RuntimeError: there is no memory for them; nothing has changed.
        """
        kept = self.num_blocks
        new_bytes: list[NDArray[np.uint8]] = []
        tensors: dict[str, Any] = {}
        for index, port in enumerate(self._ports):
            if self._context is None:
                array = _aligned(num_blocks * port.block_bytes).reshape(num_blocks, port.block_bytes)
                if kept:
                    array[:kept] = self._bytes[index]
                new_bytes.append(array)
                tensors[port.name] = self._host_tensor(array, port, num_blocks)
            else:
                tensor = self._context.create_tensor(port.type, _shape(port, num_blocks), {})
                if kept:
                    _part(tensor, port, 0, kept).copy_from(self.tensors[port.name])
                tensors[port.name] = tensor
        self._bytes, self.tensors, self.num_blocks = new_bytes, tensors, num_blocks

    def copy(self, source: int, target: int) -> None:
        """Copy one block to another."""
        if self._context is None:
            self.write([target], self.read([source]))
            return
        for port in self._ports:
            tensor = self.tensors[port.name]
            _part(tensor, port, target, 1).copy_from(_part(tensor, port, source, 1))

    def read(self, blocks: Sequence[int]) -> list[NDArray[np.uint8]]:
        """A copy of blocks; one array for each cache input, of shape [blocks, bytes of a block]."""
        if self._context is None:
            return [array[list(blocks)] for array in self._bytes]
        contents = []
        for port in self._ports:
            array = _aligned(len(blocks) * port.block_bytes).reshape(len(blocks), port.block_bytes)
            for at, first, count in _runs(blocks):
                part = _part(self.tensors[port.name], port, first, count)
                part.copy_to(self._host_tensor(array[at : at + count], port, count))
            contents.append(array)
        return contents

    def write(self, blocks: Sequence[int], contents: Sequence[NDArray[np.uint8]]) -> None:
        """Overwrite blocks, in the form that `read` returns."""
        if self._context is None:
            for array, content in zip(self._bytes, contents, strict=True):
                array[list(blocks)] = content
            return
        if not blocks:
            return
        for port, content in zip(self._ports, contents, strict=True):
            # Through a tensor on the device: a copy from the host into a part of a tensor returns before it has ended
            # (GPU plugin 2026.4.1).
            staging = self._context.create_tensor(port.type, _shape(port, len(blocks)), {})
            array = _aligned(len(blocks) * port.block_bytes).reshape(len(blocks), port.block_bytes)
            array[:] = content
            staging.copy_from(self._host_tensor(array, port, len(blocks)))
            for at, first, count in _runs(blocks):
                part = _part(self.tensors[port.name], port, first, count)
                part.copy_from(_part(staging, port, at, count))

    def clear_unused(self, contents: Sequence[NDArray[np.uint8]], used: int) -> None:
        """Clear the slots behind the first `used` tokens of the last block, which hold tokens of other sequences.

        Args:
            contents: in the form that `read` returns.
            used: tokens of the last block.
        """
        if self._context is not None:
            self._clear_unused_on_device(contents, used)
            return
        block_size = self._ports[1].block_shape[1]
        for port, content in zip(self._ports, contents, strict=True):
            heads, rows, _ = port.block_shape  # scales of a block are in its first rows
            content[-1].reshape(heads, rows, -1)[:, rows - block_size + used :] = 0

    def _clear_unused_on_device(self, contents: Sequence[NDArray[np.uint8]], used: int) -> None:
        """The same for the GPU plugin's layout (2026.4.1).

        Keys have a row for each channel, with the channel's scale behind its tokens. Values have the tokens one after
        another, then all scales. 4-bit keys are packed in bytes, so that a slot may remain in a byte that is in use;
        4-bit values are not cleared, since their order is not known.
        """
        (_, channels, key_width), block_size = self._ports[0].block_shape, self._ports[1].block_shape[1]
        bits = int(self._ports[1].type.bitwidth)
        if bits == 8 and key_width <= block_size:  # without room for a scale: two numbers are in a byte
            bits = 4
        token_bytes = channels * bits // 8
        for port, content in zip(self._ports, contents, strict=True):
            heads = content[-1].reshape(port.block_shape[0], -1)
            if port.name.startswith("value_cache."):
                if bits != 4:
                    heads[:, used * token_bytes : block_size * token_bytes] = 0
            else:
                rows = heads.reshape(len(heads), channels, -1)
                rows[:, :, -(-used * bits // 8) : block_size * bits // 8] = 0

    @staticmethod
    def _host_tensor(array: NDArray[np.uint8], port: CachePort, blocks: int) -> Any:
        """A tensor over bytes of this process, without a copy."""
        return import_openvino().Tensor(array.reshape(-1), _shape(port, blocks), port.type)


def _part(tensor: Any, port: CachePort, first: int, count: int) -> Any:
    """A remote tensor over some blocks of another."""
    openvino = import_openvino()
    begin, end = [first, 0, 0, 0], [first + count, *port.block_shape]
    return openvino.RemoteTensor(tensor, openvino.Coordinate(begin), openvino.Coordinate(end))


def _runs(blocks: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Split blocks into consecutive ones: (position in the sequence, first block, number of blocks)."""
    start = 0
    for end in range(1, len(blocks) + 1):
        if end == len(blocks) or blocks[end] != blocks[end - 1] + 1:
            yield start, blocks[start], end - start
            start = end


def _shape(port: CachePort, blocks: int) -> Any:
    return import_openvino().Shape([blocks, *port.block_shape])


def _aligned(size: int) -> NDArray[np.uint8]:
    """Uninitialised bytes at an address that suits the plugin's kernels."""
    raw = np.empty(size + _ALIGNMENT, dtype=np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size]
