"""Train olmoe-nano, the small reference model that the package carries: a real ``OlmoeForCausalLM``, from plain text.

    python scripts/train_olmoe_nano.py --text books-train.txt.xz --valid books-valid.txt.xz --out olmoe-nano --steps 3600

The model is transformers' own and is saved with ``save_pretrained``; only the forward pass used for training is written
out, in ``nano_forward.py``, because that is several times faster on one CPU core. Same arguments, seed and machine, one
thread: the same weights, also after an interruption and ``--resume``.

Every layer balances its own experts. transformers' auxiliary loss pools the router logits of all layers before it
compares load with probability, so that one layer may let experts die as long as another one makes up for it.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import lzma
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nano_forward import Fused, losses
from nano_report import evaluate, model_card, sample, table_of_load, table_of_perplexities
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from tqdm import tqdm
from transformers import AutoTokenizer, OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
CHECKPOINT_FORMAT = 1


# ---------------------------------------------------------------------------------------------------------- text


def read_text(path: Path) -> str:
    """The text of a plain or xz-compressed UTF-8 file."""
    raw = path.read_bytes()
    return (lzma.decompress(raw) if path.suffix == ".xz" else raw).decode("utf-8")


def train_tokenizer(text: str, vocab_size: int, context: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of ``vocab_size`` tokens, the end-of-text token first."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(text.split("\n"), trainer)
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), END_OF_TEXT)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, model_max_length=context, **special)


def encode_text(tokenizer: PreTrainedTokenizerFast, text: str, progress: bool = False) -> np.ndarray:
    """Token ids (uint16) of a text whose books are separated by blank lines; between books stands end-of-text."""
    pieces: list[np.ndarray] = []
    end_of_text = np.array([tokenizer.convert_tokens_to_ids(END_OF_TEXT)], dtype=np.uint16)
    for book in tqdm(text.split("\n\n"), desc="tokenise", unit="book", disable=not progress):
        start = 0
        while start < len(book):  # in pieces, cut at a line end, because one huge string is slow to encode
            cut = book.find("\n", start + 200_000)
            end = len(book) if cut < 0 else cut + 1
            ids = tokenizer.backend_tokenizer.encode(book[start:end], add_special_tokens=False).ids
            pieces.append(np.array(ids, dtype=np.uint16))
            start = end
        pieces.append(end_of_text)
    return np.concatenate(pieces[:-1])


def cached_ids(tokenizer: PreTrainedTokenizerFast, path: Path, work: Path) -> np.ndarray:
    """``encode_text`` of a file, kept in ``work`` under a name that says which text and which tokenizer it is of."""
    digest = hashlib.sha256(path.read_bytes() + tokenizer.backend_tokenizer.to_str().encode())
    cache = work / f"tokens-{digest.hexdigest()[:16]}.npy"
    if not cache.exists():
        temporary = cache.with_suffix(".tmp")
        with temporary.open("wb") as file:
            np.save(file, encode_text(tokenizer, read_text(path), progress=True))
        os.replace(temporary, cache)
    return np.load(cache)


def batch_of_step(ids: np.ndarray, step: int, windows: int, length: int, seed: int) -> Tensor:
    """The windows of one step, ``[windows, length + 1]``: a function of (seed, step), so that resuming needs no state.

    Each epoch cuts the text into windows at an offset of its own and visits them in an order of its own.
    """
    per_epoch = ((len(ids) - length - 1) // length) // windows
    if per_epoch < 1:
        raise ValueError(
            f"expected a text of at least {windows + 1} windows of {length} tokens, got {len(ids)} tokens: "
            "use a longer text, or smaller --batch-tokens"
        )
    epoch, within = divmod(step, per_epoch)
    random = np.random.default_rng([seed, epoch])
    offset = int(random.integers(length))
    order = random.permutation((len(ids) - offset - 1) // length)[within * windows : (within + 1) * windows]
    starts = offset + order * length
    return torch.from_numpy(np.stack([ids[start : start + length + 1] for start in starts]).astype(np.int64))


# ------------------------------------------------------------------------------------------------- the optimiser


def orthogonalise(update: Tensor, steps: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrices, roughly, of a stack ``[n, rows, columns]``: Newton-Schulz in bfloat16, with
    the coefficients of Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024)."""
    x = update.bfloat16()
    if tall := x.shape[1] > x.shape[2]:
        x = x.transpose(1, 2)
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.transpose(1, 2)
        x = 3.4445 * x + torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315) @ x
    return (x.transpose(1, 2) if tall else x).to(update.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised, for weight matrices and for stacks of them (one per expert).

    A group's ``parts`` says how many matrices one parameter holds, one below the other.
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float, weight_decay: float) -> None:
        super().__init__(groups, {"lr": lr, "momentum": 0.95, "weight_decay": weight_decay, "parts": 1})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].lerp_(p.grad, 1 - momentum)
                update = p.grad.lerp(state["momentum"], momentum)
                stack = update.reshape(-1, p.shape[-2] // group["parts"], p.shape[-1])
                scale = max(1.0, stack.shape[1] / stack.shape[2]) ** 0.5
                p.mul_(1 - lr * group["weight_decay"])
                p.add_(orthogonalise(stack).view_as(p), alpha=-lr * scale)


def make_optimisers(model: OlmoeForCausalLM, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or Muon for attention and experts with AdamW for embedding, router and norms."""
    named = list(model.named_parameters())
    gate_up = [p for name, p in named if name.endswith("gate_up_proj")]
    matrices = [p for name, p in named if "_proj" in name and not name.endswith("gate_up_proj")]
    rest = {"params": [p for name, p in named if "_proj" not in name], "weight_decay": 0.0}
    adamw = {"lr": args.lr, "betas": (0.9, 0.95), "weight_decay": args.weight_decay, "fused": True}
    made: list[torch.optim.Optimizer]
    if args.optimiser == "adamw":
        made = [torch.optim.AdamW([rest, {"params": gate_up + matrices}], **adamw)]
    else:
        groups = [{"params": matrices}, {"params": gate_up, "parts": 2}]
        made = [torch.optim.AdamW([rest], **adamw), Muon(groups, args.muon_lr, args.weight_decay)]
    for optimiser in made:
        for group in optimiser.param_groups:
            group["peak_lr"] = group["lr"]
    return made


def schedule(step: int, steps: int, warmup: int, decay: float) -> float:
    """Warm-up, then constant, then linear to zero over the last ``decay`` of all steps."""
    return min((step + 1) / max(warmup, 1), 1.0, (steps - step) / max(decay * steps, 1.0))


# ------------------------------------------------------------------------------------------------------ training


def write_json(path: Path, content: Any) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def make_model(args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> OlmoeForCausalLM:
    if args.init:
        return OlmoeForCausalLM.from_pretrained(args.init, dtype=torch.float32)
    end_of_text = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    config = OlmoeConfig(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=args.expert_width,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.heads,
        num_experts=args.experts,
        num_experts_per_tok=args.top_k,
        norm_topk_prob=False,
        max_position_embeddings=args.context,
        tie_word_embeddings=True,
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
        pad_token_id=end_of_text,
    )
    return OlmoeForCausalLM(config)


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """What determines the result: the arguments without the paths and without what only says how to run."""
    paths = {"text", "valid", "report", "out", "work", "init", "tokenizer", "baseline"}
    left_out = paths | {"resume", "stop_after", "checkpoint_every", "progress"}
    return {k: v for k, v in vars(args).items() if k not in left_out} | {"init": bool(args.init)}


def command_of(args: argparse.Namespace) -> str:
    """The command line with the names of files, without their folders, and every setting that is not the default."""
    parts = ["python scripts/train_olmoe_nano.py --text", args.text.name]
    parts += ["--valid", args.valid.name] if args.valid else []
    parts += [part for path in args.report for part in ("--report", path.name)]
    parts += [part for name in ("init", "tokenizer") if getattr(args, name) for part in (f"--{name}", "DIR")]
    parts += [f"--baseline '{name}=DIR'" for name, _ in args.baseline]
    parts += [f"--out {args.out.name} --steps {args.steps}"]
    shown = {
        "text",
        "valid",
        "report",
        "init",
        "tokenizer",
        "baseline",
        "out",
        "work",
        "resume",
        "stop_after",
        "progress",
    }
    paths = [str(path) for path in ("--text", args.text, "--out", args.out)]
    for name, default in vars(parse_arguments([*paths, "--steps", str(args.steps)])).items():
        value, option = getattr(args, name), name.replace("_", "-")
        if name not in shown and value != default:
            parts.append(
                f"--{'' if value else 'no-'}{option}" if isinstance(value, bool) else f"--{option} {value}"
            )
    return " ".join(parts)


def earlier_stages(init: Path | None) -> list[dict[str, Any]]:
    """Of the model that the run went on from: its stages, if this script made it."""
    if init is None or not (init / "training.json").exists():
        return []
    before = json.loads((init / "training.json").read_text(encoding="utf-8"))
    stage = {name: before[name] for name in ("command", "settings", "seconds", "curve")}
    return [*before.get("earlier_stages", []), stage]


def keep_freed_memory() -> None:
    """Have glibc keep what it frees; by default each large tensor gets fresh, zeroed pages: a tenth of a step's time."""
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another C library: only slower
        return
    M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(M_TOP_PAD, 2**26)


class Run:
    """A training run: model, optimisers and what was measured so far, all of it in the checkpoint."""

    def __init__(self, args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> None:
        torch.manual_seed(args.seed)
        self.args, self.settings = args, settings_of(args)
        self.checkpoint = args.work / "checkpoint.pt"
        self.model = make_model(args, tokenizer)
        self.optimisers = make_optimisers(self.model, args)
        self.ids = cached_ids(tokenizer, args.text, args.work)
        self.valid_ids = None
        if args.valid:
            valid_ids = cached_ids(tokenizer, args.valid, args.work)
            self.valid_ids = valid_ids[: len(valid_ids) // 2][: args.valid_tokens]
        config = self.model.config
        self.done, self.seconds, self.curve = 0, 0.0, []
        self.sums = torch.zeros(
            4
        )  # since the curve's last point: loss, balancing loss, z-loss, gradient norm
        self.load_LE = torch.zeros(config.num_hidden_layers, config.num_experts)  # likewise

    def save(self) -> None:
        content = {
            "format": CHECKPOINT_FORMAT,
            "settings": self.settings,
            "model": self.model.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
            "measured": (self.done, self.seconds, self.curve, self.sums, self.load_LE),
        }
        temporary = self.checkpoint.with_name("checkpoint.tmp")
        torch.save(content, temporary)
        os.replace(temporary, self.checkpoint)
        write_json(self.args.work / "curve.json", {"settings": self.settings, "curve": self.curve})

    def load(self) -> None:
        saved = torch.load(self.checkpoint, weights_only=True)
        if (saved["format"], saved["settings"]) != (CHECKPOINT_FORMAT, self.settings):
            raise ValueError(
                f"expected a checkpoint of format {CHECKPOINT_FORMAT} made with {self.settings}, got format "
                f"{saved['format']} and {saved['settings']}: give the same arguments, or start without --resume"
            )
        self.model.load_state_dict(saved["model"])
        for optimiser, state in zip(self.optimisers, saved["optimisers"], strict=True):
            optimiser.load_state_dict(state)
        self.done, self.seconds, self.curve, self.sums, self.load_LE = saved["measured"]

    def step(self) -> None:
        args, started = self.args, time.perf_counter()
        factor = schedule(self.done, args.steps, args.warmup, args.decay)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = group["peak_lr"] * factor
        windows = batch_of_step(self.ids, self.done, args.batch_tokens // args.window, args.window, args.seed)
        parts = args.batch_tokens // args.micro_tokens
        for part in windows.chunk(parts):
            loss, balance, z, experts = losses(
                self.model, part, torch.bfloat16 if args.bf16 else torch.float32
            )
            ((loss + args.balance * balance + args.z * z) / parts).backward()
            self.sums[:3] += torch.stack((loss, balance, z)).detach() / parts
            for layer, experts_TK in enumerate(experts):
                self.load_LE[layer] += experts_TK.flatten().bincount(minlength=self.load_LE.shape[1])
        self.sums[3] += torch.nn.utils.clip_grad_norm_(self.model.parameters(), args.clip)
        for optimiser in self.optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        self.done += 1
        self.seconds += time.perf_counter() - started
        if self.done % args.log_every == 0 or self.done == args.steps:
            self.measure(factor)

    def measure(self, lr_factor: float) -> None:
        """Add a point to the curve: means over the steps since the last one."""
        steps = (self.done - 1) % self.args.log_every + 1
        means = dict(zip(("loss", "balance", "z", "grad_norm"), (self.sums / steps).tolist(), strict=True))
        relative_LE = self.load_LE / self.load_LE.mean(dim=1, keepdim=True)
        point = {
            "step": self.done,
            "tokens": self.done * self.args.batch_tokens,
            **means,
            "lr_factor": lr_factor,
        }
        point |= {"load_min": relative_LE.min().item(), "load_max": relative_LE.max().item()}
        point |= {"seconds": self.seconds}
        due = self.done % self.args.valid_every == 0 or self.done == self.args.steps
        if self.valid_ids is not None and due:
            point["valid_loss"] = evaluate(self.model, self.valid_ids, self.args.window)["loss"]
        self.curve.append({k: round(v, 5) for k, v in point.items()})
        self.sums.zero_()
        self.load_LE.zero_()

    def go(self) -> bool:
        """Train to the last step; False where it stopped before (``--stop-after``, SIGTERM), with a checkpoint."""
        args, stopping = self.args, False

        def stop(*_: Any) -> None:
            nonlocal stopping
            stopping = True

        previous, Fused.on = signal.signal(signal.SIGTERM, stop), args.compile
        try:
            with tqdm(total=args.steps, initial=self.done, unit="step", disable=not args.progress) as bar:
                while self.done < args.steps and not stopping:
                    self.step()
                    bar.update()
                    if self.curve and self.curve[-1]["step"] == self.done:
                        bar.write(json.dumps(self.curve[-1]), file=sys.stdout)
                        sys.stdout.flush()
                    stopping = stopping or self.done == args.stop_after
                    if stopping or self.done == args.steps or self.done % args.checkpoint_every == 0:
                        self.save()
        finally:
            Fused.on = False
            signal.signal(signal.SIGTERM, previous)
        return self.done == args.steps

    def record(self) -> dict[str, Any]:
        return {
            "earlier_stages": earlier_stages(self.args.init),
            "command": command_of(self.args),
            "settings": self.settings,
            "tokenizer": "given" if self.args.tokenizer else "trained on the same text",
            "train_tokens_in_text": len(self.ids),
            "seconds": self.seconds,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "curve": self.curve,
        }


# ------------------------------------------------------------------------------------------ export and model card


def export(model: OlmoeForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> OlmoeForCausalLM:
    """Save in bfloat16 with ``save_pretrained`` and return the model as it loads from there."""
    model.to(torch.bfloat16).save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(out)
    saved = json.loads((out / "tokenizer_config.json").read_text(encoding="utf-8"))
    for where_it_came_from in ("is_local", "local_files_only"):
        saved.pop(where_it_came_from, None)
    write_json(out / "tokenizer_config.json", saved)
    return OlmoeForCausalLM.from_pretrained(out, dtype=torch.float32)


def evaluate_texts(
    model: OlmoeForCausalLM, tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    """``evaluate`` on the validation text (its first tokens, each half) and on every ``--report`` text.

    What was found is kept in ``--work``, so that the same weights are not evaluated twice on the same tokens.
    """
    weights = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        weights.update(name.encode() + tensor.numpy().tobytes())
    texts: dict[str, np.ndarray] = {}
    for path in [args.valid, *args.report]:
        if path is None:
            continue
        name, ids = path.name.removesuffix(".xz").removesuffix(".txt"), cached_ids(tokenizer, path, args.work)
        texts[f"{name}, first {args.compare_tokens:,} tokens"] = ids[: args.compare_tokens]
        if path == args.valid:
            texts[f"{name}, first half"] = ids[: len(ids) // 2]
            texts[f"{name}, second half"] = ids[len(ids) // 2 :]
        else:
            texts[f"{name}, all"] = ids
    found = {}
    for name, ids in texts.items():
        digest = hashlib.sha256(weights.digest() + ids.tobytes() + str(args.window).encode())
        kept = args.work / f"evaluation-{digest.hexdigest()[:16]}.json"
        if not kept.exists():
            Fused.on = args.compile
            write_json(kept, evaluate(model, ids, args.window, progress=args.progress))
            Fused.on = False
        found[name] = json.loads(kept.read_text(encoding="utf-8"))
    return found


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add, flag = parser.add_argument, argparse.BooleanOptionalAction
    files = "plain UTF-8 or .xz; a paragraph a line, a blank line between books"
    add("--text", type=Path, required=True, help=f"training text: {files}")
    add("--valid", type=Path, help="validation text; settings are chosen on its first half")
    add("--report", type=Path, action="append", default=[], help="another text to report on; may be repeated")
    add("--out", type=Path, required=True, help="folder for the finished model")
    add("--work", type=Path, help="folder for token ids and checkpoints (default: OUT with .work appended)")
    add("--tokenizer", type=Path, help="folder of a tokenizer to use (default: train one on --text)")
    add("--init", type=Path, help="folder of a model to go on from (default: from scratch)")
    add("--baseline", type=parse_baseline, action="append", default=[], help="NAME=DIR: evaluate it, too")
    add("--resume", action="store_true", help="go on from the checkpoint in --work, if there is one")
    add("--stop-after", type=int, help="write a checkpoint after this step and stop with exit status 3")
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--steps", type=int)
    length.add_argument("--tokens", type=int, help="tokens to train on; rounded down to whole steps")
    add("--seed", type=int, default=0)
    add("--batch-tokens", type=int, default=8192, help="tokens of a step")
    add("--micro-tokens", type=int, default=4096, help="tokens of one forward and backward pass")
    add("--window", type=int, default=256)
    add("--optimiser", choices=("muon", "adamw"), default="muon")
    add("--muon-lr", type=float, default=0.03)
    add("--lr", type=float, default=8e-3, help="of AdamW")
    add("--weight-decay", type=float, default=0.05)
    add("--warmup", type=int, default=50, help="steps")
    add(
        "--decay", type=float, default=0.5, help="last share of the steps; the learning rate falls to 0 in it"
    )
    add("--clip", type=float, default=1.0)
    add("--balance", type=float, default=0.05, help="coefficient of the per-layer balancing loss")
    add("--z", type=float, default=1e-3, help="coefficient of the router z-loss")
    add("--log-every", type=int, default=25, help="steps")
    add("--valid-every", type=int, default=250, help="steps; a multiple of --log-every")
    add("--valid-tokens", type=int, default=20_480, help="of the validation text's first half, for the curve")
    add("--compare-tokens", type=int, default=51_000, help="first tokens of a text, reported on their own")
    add("--checkpoint-every", type=int, default=200, help="steps")
    shape = {
        "vocab": 4096,
        "hidden": 128,
        "layers": 4,
        "heads": 4,
        "experts": 64,
        "top-k": 8,
        "expert-width": 64,
    }
    for name, value in {**shape, "context": 512}.items():
        add(f"--{name}", type=int, default=value, help="of a model from scratch")
    add("--threads", type=int, default=1)
    add("--bf16", action=flag, default=True, help="bfloat16 matmuls")
    add("--compile", action=flag, default=True, help="fuse elementwise chains; needs gcc")
    add("--progress", action=flag, default=True)
    args = parser.parse_args(argv)
    if args.steps is None:
        args.steps = args.tokens // args.batch_tokens
    del args.tokens
    if args.steps < 1:
        parser.error("expected at least one step: raise --tokens, or give --steps")
    if args.batch_tokens % args.micro_tokens or args.micro_tokens % args.window:
        parser.error("expected --batch-tokens a multiple of --micro-tokens, and that a multiple of --window")
    if args.valid_every % args.log_every:
        parser.error("expected --valid-every a multiple of --log-every")
    args.work = args.work or args.out.with_name(args.out.name + ".work")
    return args


def parse_baseline(value: str) -> tuple[str, Path]:
    name, equals, path = value.partition("=")
    if not (name and equals and path):
        raise argparse.ArgumentTypeError(f"expected NAME=DIR, got {value!r}")
    return name, Path(path)


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    if args.tokenizer:
        tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    else:
        tokenizer = train_tokenizer(read_text(args.text), args.vocab, args.context)
    run = Run(args, tokenizer)
    if args.resume and run.checkpoint.exists():
        run.load()
    if not run.go():
        print(f"stopped after step {run.done} of {args.steps}; --resume goes on from there")
        return 3
    record = run.record()
    model = export(run.model, tokenizer, args.out)
    record["evaluation"] = {"this model": evaluate_texts(model, tokenizer, args)}
    for name, path in args.baseline:
        other = OlmoeForCausalLM.from_pretrained(path, dtype=torch.float32)
        record["evaluation"][name] = evaluate_texts(other, AutoTokenizer.from_pretrained(path), args)
    record["samples"] = sample(model, tokenizer)
    write_json(args.out / "training.json", record)
    (args.out / "README.md").write_text(model_card(record, model.config), encoding="utf-8")
    print(table_of_perplexities(record["evaluation"]))
    print(table_of_load(record["evaluation"]["this model"]))
    return 0


if __name__ == "__main__":
    keep_freed_memory()
    sys.exit(main())
