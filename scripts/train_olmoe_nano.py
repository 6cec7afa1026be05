"""Train olmoe-nano, the small reference model that the package carries: a real ``OlmoeForCausalLM``, from scratch.

    python scripts/train_olmoe_nano.py --data mixed --work nano.work --steps 6000
    python scripts/train_olmoe_nano.py --data mixed --work nano.work --decay-steps 500 --out olmoe-nano

The first command trains at a constant learning rate and may be stopped (SIGTERM writes a checkpoint) and given
again: it goes on from the checkpoint in ``--work``. The second takes that checkpoint, lets the learning rate fall to
zero in a branch of the run, and saves the model; afterwards the first goes on as if there had been no branch.
``nano_report.py`` then measures the model and writes its card.

The model is transformers' own and is saved with ``save_pretrained``; only the forward pass used for training is written
out, in ``nano_forward.py``, because that is several times faster on one CPU core. Same arguments, seed and machine, one
thread: the same weights, also after interruptions. What is random is the first weights and the batches: both are
functions of the seed, a batch also of its step, so that the step is all a checkpoint need keep of either.

Every layer balances its own experts. transformers' auxiliary loss pools the router logits of all layers before it
compares load with probability, so that one layer may let experts die as long as another one makes up for it.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from nano_data import END_OF_TEXT, batch_of_step, bytes_of_tokens, cached_ids, kept_tokenizer, text_path
from nano_forward import Fused, losses
from nano_optimiser import learning_rate, make_optimisers
from nano_report import evaluate, write_json
from safetensors import safe_open
from tqdm import tqdm
from transformers import AutoTokenizer, OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerFast

CHECKPOINT_FORMAT = 2


def make_model(args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> OlmoeForCausalLM:
    if args.init:
        return OlmoeForCausalLM.from_pretrained(args.init, dtype=torch.float32, tie_word_embeddings=True)
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
        max_position_embeddings=args.window,
        tie_word_embeddings=True,
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
        pad_token_id=end_of_text,
    )
    return OlmoeForCausalLM(config)


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """What determines the result, to rounding: the arguments without the paths and without what only says how far and
    how to run, so that a run may go on with more threads."""
    paths, how = {"data", "work", "out", "init"}, {"checkpoint_minutes", "progress", "threads", "compile"}
    return {k: v for k, v in vars(args).items() if k not in {*paths, *how, "steps", "decay_steps"}}


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
    """A training run, or a branch of one in which the learning rate falls: all of its state is in the checkpoint.

    ``first`` is the step at which these weights were taken up (0 from scratch), ``done`` the next step, ``decay`` the
    first step and the number of steps of the branch.
    """

    def __init__(self, args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> None:
        torch.manual_seed(args.seed)
        self.args, self.settings = args, settings_of(args)
        self.dtype = torch.bfloat16 if args.bf16 else torch.float32
        self.model = make_model(args, tokenizer)
        self.optimisers = make_optimisers(self.model, args.lr, args.muon_lr, args.weight_decay, self.dtype)
        self.bytes_V = bytes_of_tokens(tokenizer)
        self.train, self.valid = (
            {
                domain: cached_ids(tokenizer, text_path(args.data, domain, split), args.work, args.progress)
                for domain in args.mixture
            }
            for split in ("train", "valid")
        )
        self.earlier: list[dict[str, Any]] = []
        self.first = 0
        if args.init:
            before = json.loads((args.init / "training.json").read_text(encoding="utf-8"))
            self.earlier, self.first = before["stages"], before["stages"][-1]["done"]
        self.done, self.decay, self.seconds, self.curve = self.first, None, 0.0, []
        config = self.model.config
        self.sums = torch.zeros(5)  # since the curve's last point: steps, losses (3), gradient norm
        self.load_LE = torch.zeros(config.num_hidden_layers, config.num_experts)  # likewise
        main, branch = args.work / "checkpoint.pt", args.work / "decay-checkpoint.pt"
        self.checkpoint = branch if args.decay_steps else main
        if self.checkpoint.exists():
            self.load(self.checkpoint)
        if args.decay_steps and self.decay is None:
            self.load(main)
            self.decay = (self.done, args.decay_steps)
        self.last = sum(self.decay) if self.decay else args.steps

    @property
    def at_end_of_branch(self) -> bool:
        return self.decay is not None and self.done == self.last

    @property
    def tokens_of_step(self) -> int:
        return sum(self.args.mixture.values()) * self.args.window

    def save(self) -> None:
        content = {
            "format": CHECKPOINT_FORMAT,
            "settings": self.settings,
            "model": self.model.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
            "run": (self.earlier, self.first, self.done, self.decay, self.seconds, self.curve),
            "sums": (self.sums, self.load_LE),
        }
        temporary = self.checkpoint.with_suffix(".tmp")
        torch.save(content, temporary)
        os.replace(temporary, self.checkpoint)

    def load(self, path: Path) -> None:
        saved = torch.load(path, weights_only=True)
        if (saved["format"], saved["settings"]) != (CHECKPOINT_FORMAT, self.settings):
            raise ValueError(
                f"expected a checkpoint of format {CHECKPOINT_FORMAT} made with {self.settings}, got format "
                f"{saved['format']} and {saved['settings']}: give the same arguments, or another --work"
            )
        self.model.load_state_dict(saved["model"])
        for optimiser, state in zip(self.optimisers, saved["optimisers"], strict=True):
            optimiser.load_state_dict(state)
        self.earlier, self.first, self.done, self.decay, self.seconds, self.curve = saved["run"]
        self.sums, self.load_LE = saved["sums"]

    def step(self) -> None:
        args, started = self.args, time.perf_counter()
        decay = (self.decay[0] - self.first, self.decay[1]) if self.decay else None
        factor = learning_rate(self.done - self.first, args.warmup, decay)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = group["peak_lr"] * factor
        windows = batch_of_step(self.train, args.mixture, self.done, args.window, args.seed)
        parts = len(windows) // args.micro_windows
        for i in range(
            parts
        ):  # every parts-th window, so that a part has all domains and can balance over them
            loss, balance, z, experts = losses(self.model, windows[i::parts], self.dtype)
            ((loss + args.balance * balance + args.z * z) / parts).backward()
            self.sums[1:4] += torch.stack((loss, balance, z)).detach() / parts
            for layer, experts_TK in enumerate(experts):
                self.load_LE[layer] += experts_TK.flatten().bincount(minlength=self.load_LE.shape[1])
        self.sums[4] += torch.nn.utils.clip_grad_norm_(self.model.parameters(), args.clip)
        for optimiser in self.optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        self.sums[0] += 1
        self.done += 1
        self.seconds += time.perf_counter() - started
        if self.done % args.log_every == 0 or self.at_end_of_branch:
            self.measure(factor)

    def measure(self, lr_factor: float) -> None:
        """Add a point to the curve: means over the steps since the last one."""
        means = (self.sums[1:] / self.sums[0]).tolist()
        relative_LE = self.load_LE / self.load_LE.mean(dim=1, keepdim=True)
        point: dict[str, Any] = {"step": self.done, "tokens": self.done * self.tokens_of_step}
        point |= dict(zip(("loss", "balance", "z", "grad_norm"), means, strict=True))
        point |= {"lr_factor": lr_factor, "seconds": self.seconds}
        point |= {"load_min": relative_LE.min().item(), "load_max": relative_LE.max().item()}
        point = {k: round(v, 5) for k, v in point.items()}
        if self.done % self.args.valid_every == 0 or self.at_end_of_branch:
            found = {
                domain: evaluate(self.model, ids[: self.args.valid_tokens], self.bytes_V, self.args.window)
                for domain, ids in self.valid.items()
            }
            point["valid"] = {domain: round(f["bits_per_byte"], 5) for domain, f in found.items()}
        self.curve.append(point)
        self.sums.zero_()
        self.load_LE.zero_()

    def go(self) -> bool:
        """Train to the last step; False where SIGTERM stopped it before. Either way there is a checkpoint."""
        args, stopping = self.args, False

        def stop(*_: Any) -> None:
            nonlocal stopping
            stopping = True

        previous, Fused.on, saved = signal.signal(signal.SIGTERM, stop), args.compile, time.monotonic()
        bar = tqdm(total=self.last, initial=self.done, unit="step", disable=not args.progress, mininterval=5)
        try:
            with bar:
                while self.done < self.last and not stopping:
                    self.step()
                    bar.update()
                    if self.curve and self.curve[-1]["step"] == self.done:
                        bar.write(json.dumps(self.curve[-1]), file=sys.stdout)
                        sys.stdout.flush()
                    due = time.monotonic() - saved >= 60 * args.checkpoint_minutes
                    if stopping or due or self.done == self.last:
                        self.save()
                        saved = time.monotonic()
        finally:
            Fused.on = False
            signal.signal(signal.SIGTERM, previous)
        return self.done >= self.last

    def record(self) -> dict[str, Any]:
        stage = {
            "settings": self.settings,
            "first": self.first,
            "done": self.done,
            "decay": self.decay,
            "seconds": self.seconds,
            "curve": self.curve,
        }
        return {
            "stages": [*self.earlier, stage],
            "tokens_in_text": {domain: len(ids) for domain, ids in self.train.items()},
            "parameters": sum(p.numel() for p in self.model.parameters()),
        }


def untied(model: OlmoeForCausalLM, window: int) -> OlmoeForCausalLM:
    """The same model in bfloat16 with an output layer of its own, equal to the embedding: vLLM's OLMoE ties nothing.
    Its configuration says on windows of how many tokens it was trained."""
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    made = OlmoeForCausalLM(
        OlmoeConfig(**model.config.to_dict() | {"tie_word_embeddings": False, "trained_window": window})
    )
    made = made.to(torch.bfloat16)
    made.load_state_dict(weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()})
    return made


def write_index(folder: Path) -> None:
    """Name the file of the weights: without that vLLM reads every .safetensors file of a folder as weights, also the
    calibration that lies beside them."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        where = dict.fromkeys(sorted(file.keys()), "model.safetensors")
        size = sum(file.get_tensor(name).nbytes for name in where)
    write_json(
        folder / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": where}
    )


def export(run: Run, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Save model (in bfloat16), tokenizer and ``training.json``; every file is complete before it gets its place."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as temporary:
        made = Path(temporary)
        untied(run.model, run.args.window).save_pretrained(made)
        write_index(made)
        tokenizer.save_pretrained(made)
        saved = json.loads((made / "tokenizer_config.json").read_text(encoding="utf-8"))
        for where_it_came_from in ("is_local", "local_files_only"):
            saved.pop(where_it_came_from, None)
        write_json(made / "tokenizer_config.json", saved)
        write_json(made / "training.json", run.record())
        for file in sorted(made.iterdir()):
            file.chmod(0o644)
            os.replace(file, out / file.name)


def parse_mixture(value: str) -> dict[str, int]:
    try:
        mixture = {name: int(windows) for name, windows in (part.split("=") for part in value.split(","))}
    except ValueError:
        mixture = {}
    if not mixture or min(mixture.values()) < 1:
        raise argparse.ArgumentTypeError(f"expected DOMAIN=WINDOWS,DOMAIN=WINDOWS,..., got {value!r}")
    return mixture


MIXTURE = "fiction=8,encyclopaedia=6,docs=6,code=6,dialogue=3,simple=3"


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add, flag = parser.add_argument, argparse.BooleanOptionalAction
    add("--data", type=Path, required=True, help="folder of DOMAIN-train.jsonl.xz and DOMAIN-valid.jsonl.xz")
    add("--work", type=Path, required=True, help="folder for tokenizer, token ids and checkpoints")
    add(
        "--init",
        type=Path,
        help="folder of a model to go on from, with its tokenizer (default: from scratch)",
    )
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--steps", type=int, help="train up to this step, at a constant learning rate")
    length.add_argument("--decay-steps", type=int, help="a branch of so many steps, down to learning rate 0")
    add("--out", type=Path, help="folder for the model of the branch")
    add("--seed", type=int, default=0)
    add("--mixture", type=parse_mixture, default=MIXTURE, help="windows of each domain in a step")
    add("--window", type=int, default=512, help="tokens of a window, and the model's context")
    add("--micro-windows", type=int, default=8, help="windows of one forward and backward pass")
    add("--muon-lr", type=float, default=0.02, help="of attention and experts")
    add("--lr", type=float, default=5e-3, help="of embedding, router and norms (AdamW)")
    add("--weight-decay", type=float, default=0.05, help="of attention and experts")
    add("--warmup", type=int, default=100, help="steps")
    add("--clip", type=float, default=1.0)
    add("--balance", type=float, default=0.05, help="coefficient of the per-layer balancing loss")
    add("--z", type=float, default=1e-3, help="coefficient of the router z-loss")
    add("--log-every", type=int, default=25, help="steps")
    add("--valid-every", type=int, default=250, help="steps; a multiple of --log-every")
    add(
        "--valid-tokens", type=int, default=20_480, help="first tokens of each validation text, for the curve"
    )
    add("--checkpoint-minutes", type=float, default=10)
    shape = {
        "vocab": 8192,
        "hidden": 256,
        "layers": 4,
        "heads": 4,
        "experts": 64,
        "top-k": 8,
        "expert-width": 64,
    }
    for name, value in shape.items():
        add(f"--{name}", type=int, default=value, help="of a model from scratch")
    add("--tokenizer-characters", type=int, default=32_000_000, help="of text to train the tokenizer on")
    add("--threads", type=int, default=1)
    add("--bf16", action=flag, default=False, help="bfloat16 matmuls: for processors that have them")
    add("--compile", action=flag, default=True, help="fuse elementwise chains; needs gcc")
    add("--progress", action=flag, default=True)
    args = parser.parse_args(argv)
    if sum(args.mixture.values()) % args.micro_windows:
        parser.error("expected the windows of --mixture to be a multiple of --micro-windows")
    if args.valid_every % args.log_every:
        parser.error("expected --valid-every a multiple of --log-every")
    if (args.out is None) != (args.decay_steps is None):
        parser.error("expected --out with --decay-steps, and only with it")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    if args.init:
        tokenizer = AutoTokenizer.from_pretrained(args.init)
    else:
        size = args.tokenizer_characters
        tokenizer = kept_tokenizer(args.work, args.data, args.mixture, size, args.vocab, args.window)
    run = Run(args, tokenizer)
    if not run.go():
        print(f"stopped after step {run.done} of {run.last}; the same command goes on from there")
        return 3
    if args.out:
        export(run, tokenizer, args.out)
        run.checkpoint.unlink()
    return 0


if __name__ == "__main__":
    keep_freed_memory()
    sys.exit(main())
