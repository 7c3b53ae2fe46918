"""Saved prefixes and chats on the engine, and in other processes."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from paged import evict_all
from reference import Reference

import ov_phi3
from ov_phi3 import ModelWarning, Pipeline, SnapshotError, StreamError
from ov_phi3.kv import snapshot
from ov_phi3.kv.entry import KVEntry
from ov_phi3.kv.fingerprint import fingerprint_of
from snapshots import edited, meta, small

GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 20}
SYSTEM = "You are a helpful assistant who keeps to the facts."


class TestSaved:
    """In float32: a loaded conversation continues exactly like the saved one."""

    def test_chat(self, loop: Pipeline, tmp_path: Path) -> None:
        chat = loop.chat(system=SYSTEM, overflow="drop_oldest", on_cancel="drop")
        for text in ("I am Ada.", "Who am I?"):
            chat.send(text, **GREEDY)
        chat.save(tmp_path / "ada.kv")
        loaded = loop.load_chat(tmp_path / "ada.kv")
        assert loaded.messages == chat.messages
        assert loaded.token_ids.tolist() == chat.token_ids.tolist()
        assert (loaded.overflow, loaded.on_cancel, loaded.dropped_turns) == ("drop_oldest", "drop", 0)
        assert loaded.kv.cached_tokens == len(chat.token_ids) - 1
        reply = loaded.send("And now?", **GREEDY)
        assert reply.token_ids == chat.send("And now?", **GREEDY).token_ids
        loaded.rewind(3)
        assert loaded.messages == [{"role": "system", "content": SYSTEM}]

    def test_before_its_first_turn(self, loop: Pipeline, tmp_path: Path) -> None:
        loop.chat(system=SYSTEM).save(tmp_path / "new.kv")
        loaded = loop.load_chat(tmp_path / "new.kv")
        assert loaded.messages == [{"role": "system", "content": SYSTEM}]
        assert loaded.send("Hi", **GREEDY).token_ids == loop.chat(system=SYSTEM).send("Hi", **GREEDY).token_ids

    def test_evicted_keys_are_computed_again(self, loop: Pipeline, tmp_path: Path) -> None:
        chat = loop.chat(system=SYSTEM)
        chat.send("Name a river.", **GREEDY)
        evict_all(loop)
        assert chat.kv.cached_tokens == 0
        chat.save(tmp_path / "a.kv")
        assert loop.load_chat(tmp_path / "a.kv").kv.cached_tokens == len(chat.token_ids) - 1

    def test_while_a_reply_is_generated(self, loop: Pipeline, tmp_path: Path) -> None:
        chat = loop.chat()
        with chat.stream("Tell me about the sea.", max_new_tokens=200, ignore_eos=True) as stream:
            reading = iter(stream)
            next(reading)
            with pytest.raises(StreamError, match="still coming"):
                chat.save(tmp_path / "a.kv")
        chat.save(tmp_path / "a.kv")
        assert loop.load_chat(tmp_path / "a.kv").messages == chat.messages

    def test_prefix(self, loop: Pipeline, tmp_path: Path) -> None:
        prefix = loop.prefill([{"role": "system", "content": SYSTEM}])
        size = prefix.save(tmp_path / "sys.kv")
        assert size == (tmp_path / "sys.kv").stat().st_size
        loaded = loop.load_prefix(tmp_path / "sys.kv")
        assert loaded.token_ids.tolist() == prefix.token_ids.tolist()
        assert loaded.exact
        expected = loop.generate("Hi", prefix=prefix, **GREEDY)
        assert loop.generate("Hi", prefix=loaded, **GREEDY).token_ids == expected.token_ids
        # Saved again over the file that holds its tensors.
        loaded.save(tmp_path / "sys.kv")
        assert loop.generate("Hi", prefix=loaded, **GREEDY).token_ids == expected.token_ids

    def test_the_other_kind(self, loop: Pipeline, tmp_path: Path) -> None:
        loop.prefill([5, 6, 7]).save(tmp_path / "p.kv")
        loop.chat().save(tmp_path / "c.kv")
        with pytest.raises(SnapshotError, match=r"holds a prefix, not a chat; load it with load_prefix\(\)"):
            loop.load_chat(tmp_path / "p.kv")
        with pytest.raises(SnapshotError, match=r"holds a chat, not a prefix; load it with load_chat\(\)"):
            loop.load_prefix(tmp_path / "c.kv")

    def test_another_model(self, loop: Pipeline, tiny_loop: Pipeline, tmp_path: Path) -> None:
        loop.prefill([5, 6, 7]).save(tmp_path / "p.kv")
        with pytest.raises(SnapshotError, match="is of another model: model is '.*' in the file and '.*' here"):
            tiny_loop.load_prefix(tmp_path / "p.kv")

    def test_a_chat_outlives_a_release(self, tiny_loop: Pipeline, tmp_path: Path) -> None:
        """Another OpenVINO release cannot use its keys and values, but its conversation."""
        path = tmp_path / "c.kv"
        chat = tiny_loop.chat()
        chat.send("Hi", max_new_tokens=3)
        chat.save(path)
        path.write_bytes(edited(path.read_bytes(), meta(engine="openvino 2030.1")))
        loaded = tiny_loop.load_chat(path)
        assert loaded._held_kv is None
        assert loaded.messages == chat.messages

    def test_on_the_other_backend(self, tiny_loop: Pipeline, tiny_pipe: Pipeline, tmp_path: Path) -> None:
        """Conversations move from one backend to the other, without their keys and values."""
        chat = tiny_pipe.chat(system="Be brief.")
        chat.send("Hi", max_new_tokens=3, ignore_eos=True)
        chat.save(tmp_path / "a.kv")
        loaded = tiny_loop.load_chat(tmp_path / "a.kv")
        assert loaded.token_ids.tolist() == chat.token_ids.tolist()
        expected = chat.send("More", ignore_eos=True, **GREEDY).token_ids
        assert loaded.send("More", ignore_eos=True, **GREEDY).token_ids == expected
        loaded.save(tmp_path / "b.kv")
        back = tiny_pipe.load_chat(tmp_path / "b.kv")
        assert back.messages == loaded.messages

    @pytest.mark.parametrize(
        "change",
        [
            lambda c: c.update(turns=5),
            lambda c: c["turns"][0].__setitem__(2, [10**9]),
            lambda c: c["turns"][0].__setitem__(2, []),
            lambda c: c["turns"][0].__setitem__(1, 5),
            lambda c: c["turns"][0].__setitem__(0, "Something else"),
            lambda c: c.update(overflow="explode"),
            lambda c: c.update(system=7),
            lambda c: c.pop("dropped"),
        ],
    )
    def test_forged_conversations(self, tiny_loop: Pipeline, tmp_path: Path, change: Any) -> None:
        chat = tiny_loop.chat()
        chat.send("Hi", max_new_tokens=3, ignore_eos=True)
        chat.save(tmp_path / "a.kv")
        saved = snapshot.read(tmp_path / "a.kv")
        conversation = json.loads(json.dumps(saved.conversation))
        change(conversation)
        forged = snapshot.Snapshot("chat", saved.fingerprint, saved.ids, saved.entry, conversation)
        snapshot.write(tmp_path / "b.kv", forged)
        with pytest.raises(SnapshotError, match="damaged"):
            tiny_loop.load_chat(tmp_path / "b.kv")

    def test_ids_and_shapes_of_another_model(self, tiny_loop: Pipeline, tmp_path: Path) -> None:
        fingerprint = fingerprint_of(tiny_loop.info, tiny_loop.tokenizer.template)
        whole = tiny_loop.prefill(list(range(300, 340))).entry
        tensors = whole.tensors
        narrow = replace(tensors, arrays=tuple(array[:, :-1] for array in tensors.arrays))
        fewer = replace(tensors, arrays=tensors.arrays[:-2])
        sparse = replace(tensors, arrays=tuple(array[:1] for array in tensors.arrays), block_size=1000)
        for name, ids, entry in (
            ("shape", whole.ids, replace(whole, tensors=narrow)),
            ("layers", whole.ids, replace(whole, tensors=fewer)),
            ("blocks", whole.ids, replace(whole, tensors=sparse)),
            ("ids", np.array([10**7]), KVEntry.empty()),
        ):
            snapshot.write(tmp_path / name, snapshot.Snapshot("prefix", fingerprint, ids, entry))
            with pytest.raises(SnapshotError, match="damaged"):
                tiny_loop.load_prefix(tmp_path / name)

    def test_another_memory_layout_is_prefilled_again(self, tiny_loop: Pipeline, tmp_path: Path) -> None:
        fingerprint = fingerprint_of(tiny_loop.info, tiny_loop.tokenizer.template)
        snapshot.write(tmp_path / "a.kv", snapshot.Snapshot("prefix", fingerprint, small().ids, small().entry))
        with pytest.warns(ModelWarning, match="another memory layout .*Save it again"):
            prefix = tiny_loop.load_prefix(tmp_path / "a.kv")
        assert prefix.token_ids.tolist() == small().ids.tolist()
        assert prefix.dtype == "f32"

    def test_no_room_in_the_window(self, tiny_loop: Pipeline, tiny_fp32: Path, device: str, tmp_path: Path) -> None:
        tiny_loop.prefill(list(range(300, 400))).save(tmp_path / "p.kv")
        with (
            ov_phi3.load(tiny_fp32, device=device, backend="infer_request", context_length=64) as pipe,
            pytest.raises(SnapshotError, match="100 tokens, which leaves no room.*longer context_length"),
        ):
            pipe.load_prefix(tmp_path / "p.kv")


@pytest.mark.parametrize("precision", ["f16", "u8", "f32"])
def test_precisions(demo_int4: Path, device: str, tmp_path: Path, precision: str) -> None:
    """The saved blocks equal the engine's, bit for bit, in every precision."""
    config = {"KV_CACHE_PRECISION": precision}
    if precision == "f32":
        config["INFERENCE_PRECISION_HINT"] = "f32"  # a CPU that computes in bfloat16 has no float32 cache
    with ov_phi3.load(demo_int4, device=device, backend="infer_request", ov_config=config) as pipe:
        prefix = pipe.prefill([{"role": "system", "content": SYSTEM}])
        size = prefix.save(tmp_path / "p.kv")
        loaded = pipe.load_prefix(tmp_path / "p.kv")
        assert loaded.exact
        assert prefix.exact
        assert loaded.dtype == prefix.dtype
        assert prefix.dtype in ("f16", "bf16") if precision == "f16" else prefix.dtype == precision
        layout = pipe.engine.kv_plan.layout
        blocks = -(-len(prefix) // layout.block_size)
        assert prefix.nbytes == blocks * layout.block_bytes(pipe.info)
        assert abs(size - prefix.nbytes) < 32_000
        replies = []
        for one in (loaded, prefix):
            evict_all(pipe)  # both prefill the same tokens behind the prefix: int4 weights round others otherwise
            reply = pipe.generate("Who are you?", prefix=one, **GREEDY)
            assert reply.metrics.reused_tokens == len(prefix)
            replies.append(reply.token_ids)
        assert replies[0] == replies[1]


def test_on_both_sides_of_the_longrope_boundary(longrope: tuple[Path, Path, int], device: str, tmp_path: Path) -> None:
    boundary = longrope[2]
    reference = Reference(longrope[1], boundary)
    ids = np.random.default_rng(3).integers(300, 31_000, 3 * boundary).tolist()
    options = {**GREEDY, "ignore_eos": True}
    with ov_phi3.load(longrope[0], device=device, backend="infer_request") as pipe:
        for length in (boundary - 10, boundary + 7):
            pipe.prefill(ids[:length]).save(tmp_path / f"{length}.kv")
        chat = pipe.chat()
        while len(chat.token_ids) < boundary:
            chat.send("More of it.", **options)
        chat.save(tmp_path / "chat.kv")
        expected = chat.send("And on.", **options)
    with ov_phi3.load(longrope[0], device=device, backend="infer_request") as pipe:
        for length, more in ((boundary - 10, 5), (boundary + 7, 5), (boundary - 10, 30)):
            prefix = pipe.load_prefix(tmp_path / f"{length}.kv")
            assert prefix.entry.long_rope == (length > boundary)
            prompt = ids[: length + more]
            reply = pipe.generate(prompt, prefix=prefix, **options)
            assert reference.differences(prompt, reply.token_ids) == []
        loaded = pipe.load_chat(tmp_path / "chat.kv")
        reply = loaded.send("And on.", **options)
        assert reply.token_ids == expected.token_ids
        assert reference.differences(reply.prompt_token_ids, reply.token_ids) == []
        assert reply.metrics.reused_tokens


CHILD = """
import json, sys
import ov_phi3
model, device, folder = sys.argv[1:4]
pipe = ov_phi3.load(model, device=device, backend="infer_request")
out = {}
for number in map(int, sys.argv[4:]):
    chat = pipe.load_chat(f"{folder}/{number}.kv")
    cached = chat.kv.cached_tokens
    reply = chat.send("And then?", do_sample=False, max_new_tokens=12)
    out[number] = [cached, reply.metrics.reused_tokens, reply.token_ids]
print(json.dumps(out))
"""


def conversations(pipe: Pipeline, draw: random.Random, count: int) -> Iterator[tuple[int, Any]]:
    """Chats of 1 to 1,500 tokens, some of them forked or rewound."""
    words = [
        "the sea",
        "a fox",
        "bread",
        "rain",
        "a long road",
        "seven stones",
        "my brother",
        "the moon",
        "old books",
        "green tea",
    ]
    for number in range(count):
        target = int(1500 ** draw.uniform(0, 1))
        chat = pipe.chat(
            system=None if number % 3 else " ".join(draw.choice(words) for _ in range(draw.randint(1, 30)))
        )
        while len(chat.token_ids) < target:
            room = target - len(chat.token_ids)
            text = " ".join(draw.choice(words) for _ in range(max(1, min(room // 3, draw.choice([3, 40, 200])))))
            chat.send(text, max_new_tokens=draw.randint(1, 10), temperature=1.0, ignore_eos=bool(number % 2))
        if number % 5 == 1 and len(chat.messages) > 3:
            chat.rewind()
        if number % 5 == 2:
            other = chat.fork()
            other.send("Something else.", max_new_tokens=3)
            chat = other if number % 2 else chat
        yield number, chat


def test_fifty_conversations_in_another_process(loop: Pipeline, demo_fp32: Path, device: str, tmp_path: Path) -> None:
    """Saved here, loaded there: the next ids equal those of the uninterrupted conversation."""
    expected = {}
    lengths = []
    for number, chat in conversations(loop, random.Random(50), 50):
        chat.save(tmp_path / f"{number}.kv")
        lengths.append(len(chat.token_ids))
        reply = chat.send("And then?", do_sample=False, max_new_tokens=12)
        expected[number] = [lengths[-1] - 1, reply.token_ids]
    assert min(lengths) < 40
    assert max(lengths) > 900
    command = [sys.executable, "-c", CHILD, str(demo_fp32), device, str(tmp_path), *map(str, expected)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    replies = {int(number): value for number, value in json.loads(done.stdout).items()}
    assert {number: [cached, ids] for number, (cached, _, ids) in replies.items()} == expected
    assert all(reused >= cached - 1 for cached, reused, _ in replies.values())
