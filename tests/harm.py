"""Files that somebody made to do harm."""

import io
import json
import pickle
import struct
from pathlib import Path

import torch


class Harm:
    """A pickle of it writes a file when it is read."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def harmful_tensors(proof: Path) -> list[bytes]:
    """Files that call themselves safetensors: a pickle, headers that lie about their length,
    offsets beyond the end or over one another, sizes that overflow, no JSON, and very deep JSON."""

    def file(header: bytes, body: bytes = b"\0" * 16, length: int | None = None) -> bytes:
        return struct.pack("<Q", len(header) if length is None else length) + header + body

    def entry(shape, offsets) -> bytes:
        return json.dumps({"w": {"dtype": "F32", "shape": shape, "data_offsets": offsets}}).encode()

    two = {name: {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} for name in "ab"}
    saved = io.BytesIO()
    torch.save({"w": Harm(proof)}, saved)
    return [
        saved.getvalue(),
        pickle.dumps(Harm(proof)),
        file(entry([4], [0, 16]), length=2**62),
        file(entry([4], [0, 2**40])),
        file(entry([2**40, 2**40], [0, 16])),
        file(entry([-1], [0, 16])),
        file(json.dumps(two).encode()),
        file(b'{"w": ' * 3000),
        file(b"not json at all"),
        b"",
        b"\xff" * 7,
    ]
