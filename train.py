"""Train LiteVAE: on built-in images in minutes, or on a folder of your own.

    python train.py                                             the quick start: LiteVAE-S, built-in images
    python train.py --data DIR --out runs/mine                  the paper's recipe: LiteVAE-B at 128x128
    python train.py --data DIR --init runs/mine/checkpoint.pt --resolution 256 --steps 50000 --out runs/mine-256
                                                                fine-tuning at 256 (Sec. 4.3, Table 5)
    python train.py --data DIR --model sd-vae --out runs/sd     what the paper compares with: see the groups below
    python train.py --out runs/mine --resume                    resume a run, bit-exactly on a CPU
    torchrun --nproc_per_node=2 train.py --data DIR             one run on two processes or GPUs

A run writes into --out:  checkpoint.pt  (weights, EMA weights, optimisers, step),  log.csv  (every logged
value),  curves.png  and  reconstructions-STEP.png  (held-out images beside their reconstructions).

From top to bottom:

    1  The two recipes         QUICK_START, PAPER
    2  Options                 build_parser, parse_args
    3  The step                AutoencoderTask: Eq. 1 and the discriminator
    4  The loop                fit, main
    The method ends here. Below are its parts, and what every training script needs:
    5  Ablations of the step   AblationTask: adaptive weight, LDL, gradient ratio
    6  Images                  open_images, find_images, ImageFolder, DeadLeaves, Shapes, load_image
    7  PSNR, grids and plots   psnr, save_grid, plot
    8  The machine             batches, Machine: device, precision, processes
    9  Around the loop         EMA, signals, lock, log, run_script
   10  Built-in images         dead_leaves, shape
"""

import argparse
import contextlib
import copy
import csv
import functools
import io
import math
import os
import signal
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import scipy.ndimage
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from litevae import (DWT_LATENTS, LOSS_WEIGHTS, LPIPS, PRESETS, CheckpointError, ESRGANPerceptual, LiteVAE,
                     PatchDiscriminator, StyleGANDiscriminator, UNetDiscriminator, adaptive_weight,
                     autoencoder_loss, build_autoencoder, discriminator_loss, gradient_norms, hinge_d_loss,
                     hinge_g_loss, ldl_loss, load_checkpoint, logistic_d_loss, logistic_g_loss, one_line,
                     save_checkpoint)

# --- 1  The two recipes -------------------------------------------------------------------------------

# Shared by both recipes: ablation options and run options.
COMMON = dict(
    data=None, val=None, init=None, resume=False, seed=0, workers=None, device=None, precision="auto", compile=False,
    clip=1.0, model="litevae", use_1x1_conv=False, extractor="unet", shared_extractor=False, aggregator="unet",
    last_two_levels=False, weight_ldl=0.0, adv_loss="hinge", adaptive_weight=False, disc_channels=64,
    disc_start=None, disc_warmup=None,
    **{f"weight_{name}": weight for name, weight in LOSS_WEIGHTS.items()})

# What `python train.py` runs: tuned for the PSNR that a few minutes on two CPU cores can reach. Many steps
# on small batches of small crops, and a learning rate that decays to 0. Predicting wavelets removes the decoder's
# costliest stage; a low wavelet weight favours L1. An SMC decoder does not normalise its input, and at this learning
# rate latents can diverge: a longer warm-up and 100 times LDM's KL weight prevent it.
QUICK_START = dict(
    COMMON,
    size="S", latent_dim=12, decoder_channels=16, output_type="wavelet", use_smc=True,
    resolution=48, batch_size=4, steps=1490,
    lr=4e-3, beta1=0.9, beta2=0.99, lr_warmup=200, lr_decay=0.7, ema=0.99,
    perceptual="none", weight_wavelet=0.1, weight_gaussian=0.0, weight_kl=1e-4,
    discriminator="none", save_every=745, log_every=20)

# What `--data` runs. Paper: App. F for model, batch, steps, optimiser; Sec. 4.3 for the losses.
# Unspecified: everything else. The learning rate is constant. "Batch size 16 on two GPUs" is read as 16 in all. EMA as
# in LDM and DiT.
PAPER = dict(
    COMMON,
    size="B", latent_dim=4, decoder_channels=128, output_type="image", use_smc=False,
    resolution=128, batch_size=16, steps=200_000,
    lr=1e-4, beta1=0.5, beta2=0.9, lr_warmup=0, lr_decay=0.0, ema=0.9999,
    perceptual="lpips", discriminator="unet", save_every=2_000, log_every=50)

PERCEPTUAL = {"lpips": LPIPS, "esrgan": ESRGANPerceptual}
ADVERSARIAL = {"hinge": (hinge_g_loss, hinge_d_loss), "logistic": (logistic_g_loss, logistic_d_loss)}
SMALLEST = {"none": 8, "unet": 16, "patchgan": 24, "stylegan": 8}  # smallest resolution of each discriminator

# Options stored in the autoencoder's config: of every model's decoder, and of LiteVAE's encoder.
DECODER = ("latent_dim", "decoder_channels", "output_type", "use_smc")
VARIANT = ("extractor", "shared_extractor", "aggregator", "last_two_levels")
ENCODER = ("size", "use_1x1_conv", *VARIANT)

# {option: the options that do nothing where it is "none", or where --model is not litevae}
SWITCHES = {"model": ENCODER, "perceptual": ("weight_perceptual",), "discriminator": (
    "disc_channels", "disc_start", "disc_warmup", "adv_loss", "weight_adv", "adaptive_weight")}

HELD_OUT = 64  # images at most
TRAINED = Path(__file__).with_name("assets") / "litevae-s.pt"  # a LiteVAE-S to try; the README says how it was trained


# --- 2  Options ---------------------------------------------------------------------------------------


def checked(kind, fits, words):
    """An argparse type: kind(text); an error with `words` unless fits(value)."""
    def parse(text):
        value = kind(text)
        if not fits(value):
            raise argparse.ArgumentTypeError(f"must be {words}, got {text}")
        return value
    parse.__name__ = kind.__name__  # argparse's own refusal names it: "invalid int value"
    return parse


positive_int = checked(int, lambda v: v > 0, "a whole number above 0")
natural = checked(int, lambda v: v >= 0, "a whole number, 0 or above")
multiple_of_8 = checked(int, lambda v: v > 0 and v % 8 == 0, "a multiple of 8")
seed = checked(int, lambda v: 0 <= v < 2**32 - 1, f"a whole number from 0 to {2**32 - 2}")
positive = checked(float, lambda v: 0 < v < math.inf, "a number above 0")
non_negative = checked(float, lambda v: 0 <= v < math.inf, "a number, 0 or above")
number = checked(float, math.isfinite, "a finite number")
fraction = checked(float, lambda v: 0 <= v < 1, "a number from 0 to below 1")

# {group: {option: (kind, help)}}; kind is an argparse type, a list of choices, or bool for a switch. An option that is
# not given is not in the namespace: its value comes from a recipe, or with --resume from the checkpoint.

RUN_OPTIONS = {"run": {
    "data": (str, "folder of images to train on, searched recursively (default: built-in images)"),
    "val": (str, f"folder of held-out images, of which {HELD_OUT} evenly spaced ones are measured (default: 1 file in "
                 f"20 of --data, {HELD_OUT} at most, evenly spaced)"),
    "out": (str, "folder for checkpoint, log and pictures (default: runs/quickstart, with --data runs/litevae; of "
                 "sample_ldm.py runs/ldm)"),
    "resume": (bool, "go on from --out's checkpoint, with the options it was started with"),
    "steps": (positive_int, "updates of the model"),
    "batch_size": (positive_int, "images a step, over all processes"),
    "resolution": (multiple_of_8, "side of the square crops in pixels, a multiple of 8"),
    "seed": (seed, "seed of weights, images and noise"),
    "save_every": (positive_int, "steps between checkpoints, pictures and held-out measurements"),
    "log_every": (positive_int, "steps between rows of log.csv"),
    "workers": (natural, "processes that load images (default: one a core, 8 at most; on a CPU none)"),
    "device": (str, "cuda, cuda:1, mps, cpu (default: the best there is)"),
    "precision": (["auto", "fp32", "bf16"], "of the networks; auto is bf16 on GPUs and CPUs built for it"),
    "compile": (bool, "torch.compile the model: a slow start, then faster steps")}}

OPTIMISER_OPTIONS = {"optimisation": {
    "lr": (positive, "Adam's learning rate"),
    "beta1": (fraction, "Adam's first beta"),
    "beta2": (fraction, "Adam's second beta"),
    "lr_warmup": (natural, "steps of linear warm-up"),
    "lr_decay": (fraction, "share of the steps, at the end, over which the rate falls linearly to 0"),
    "clip": (positive, "largest gradient norm"),
    "ema": (fraction, "decay of the EMA weights, reached from (1+n)/(10+n)")}}

OPTIONS = {
    **RUN_OPTIONS,
    "the start": {
        "init": (str, "start from this checkpoint's EMA weights and discriminator, e.g. with --resolution 256 for the "
                      "second stage; or from a released Stable Diffusion autoencoder")},
    "Tables 1, 2, 11, 12, 13 and 22: the autoencoder": {
        "model": (["litevae", "sd-vae", "vae-small", "dwt", "dwt-2"], "LiteVAE; Stable Diffusion's; that with a small "
                  "encoder; a wavelet transform and a decoder"),
        "size": (list(PRESETS), "LiteVAE's encoder, Tables 23 and 24"),
        "latent_dim": (positive_int, "channels of the latent; dwt has 12, dwt-2 has 48"),
        "decoder_channels": (positive_int, "width of the decoder; 128 is Stable Diffusion's"),
        "output_type": (["image", "wavelet"], "what the decoder predicts")},
    "Table 4 and Figure 8: normalisation in the decoder": {
        "use_smc": (bool, "SMC instead of GroupNorm, Sec. 4.2")},
    "Table 17: 1x1 convolutions around the latent": {
        "use_1x1_conv": (bool, "with them")},
    "Tables 18 to 21: the parts of LiteVAE's encoder": {
        "extractor": (["unet", "nafnet"], "Table 18: extracts a level's features"),
        "shared_extractor": (bool, "Table 19: one extractor for all levels"),
        "aggregator": (["unet", "vit"], "Table 20: joins the levels; vit works at one resolution only"),
        "last_two_levels": (bool, "Table 21: without the level of the highest resolution")},
    **OPTIMISER_OPTIONS,
    "Eq. 1 and Table 9: weights of the losses, 0 is without": {
        f"weight_{name}": (non_negative, f"of the {name} term") for name in ("l1", "kl", "wavelet", "gaussian")},
    "Table 14: perceptual loss": {
        "perceptual": ([*PERCEPTUAL, "none"], "LPIPS, or ESRGAN's VGG features before their activation"),
        "weight_perceptual": (non_negative, "its weight")},
    "Table 15: locally discriminative learning": {
        "weight_ldl": (non_negative, "weight of the LDL term, 1 in its paper; 0 is without")},
    "Table 10: discriminator": {
        "discriminator": (["unet", "stylegan", "patchgan", "none"], "stylegan is StyleGAN2's"),
        "disc_channels": (positive_int, "its width"),
        "disc_start": (natural, "step from which its loss counts (default: a quarter of --steps; 0 if --init brings a "
                                "trained one)"),
        "disc_warmup": (natural, "steps it trains before that, and over which its weight then ramps up (default: a "
                                 "tenth of --disc-start)")},
    "Table 16: adversarial loss": {
        "adv_loss": (list(ADVERSARIAL), "of both players; logistic is the non-saturating one")},
    "Table 8 and Figure 7: weight of the adversarial loss": {
        "weight_adv": (non_negative, "a constant"),
        "adaptive_weight": (bool, "instead the adaptive weight of Eq. 2")},
}


def add_options(parser, options, quick, data):
    """Add a table of options to the parser, each with its default in the quick start and with --data in the help."""
    for title, group in options.items():
        add = parser.add_argument_group(title).add_argument
        for key, (kind, help) in group.items():
            if quick.get(key) is not None:
                differs = data[key] != quick[key]
                help += f" (default: {quick[key]}" + (f", with --data {data[key]})" if differs else ")")
            how = {"choices": kind} if isinstance(kind, list) else {"type": kind}
            if kind is bool:
                how = {"action": argparse.BooleanOptionalAction}
            add(flag(key), help=help, default=argparse.SUPPRESS, **how)


def build_parser():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, OPTIONS, QUICK_START, PAPER)
    return parser


# Options that --resume may change; all others stay.
CHANGEABLE = {"steps", "save_every", "log_every", "workers", "device", "precision", "compile", "data", "val", "lr",
              "clip", "resume", "out"}


def merge(typed, recipe, load=load_checkpoint):
    """A recipe's options, or with --resume the run's, updated by those given; and the run's checkpoint or None."""
    path = Path(typed["out"], "checkpoint.pt")
    if not typed.get("resume"):
        if path.exists():
            raise UsageError(f"{typed['out']} already holds a run: go on with --resume, or choose another --out")
        return {**recipe, **typed}, None
    checkpoint = load(path)
    if not {"training", "args", "step", "ema"} <= checkpoint.keys():
        raise UsageError(f"{path} holds a model but no training state: it cannot be resumed")
    kept = {**recipe, **checkpoint["args"]}  # the file may be older than an option
    for key in typed.keys() - CHANGEABLE:
        if typed[key] != kept.get(key):
            raise UsageError(f"the run in {typed['out']} was started with {flag(key)} {kept.get(key)}, not "
                             f"{typed[key]}: a resumed run keeps it, so leave the option out")
    options = {**kept, **typed}
    if checkpoint["step"] >= options["steps"]:
        raise UsageError(f"the run in {typed['out']} has done its {checkpoint['step']} steps: raise --steps to go on")
    return options, checkpoint


def parse_args(argv=None):
    """The options of the command line as a namespace, and the checkpoint of --resume or --init, or None."""
    typed = vars(build_parser().parse_args(argv))
    if typed.get("resume") and "out" not in typed:
        raise UsageError("--resume needs --out, the folder of the run to go on with")
    typed.setdefault("out", "runs/litevae" if "data" in typed else "runs/quickstart")
    recipe = PAPER if "data" in typed else QUICK_START
    if typed.get("model") in DWT_LATENTS:
        recipe = {**recipe, "latent_dim": DWT_LATENTS[typed["model"]]}
    options, checkpoint = merge(typed, recipe)
    if options["init"] and not checkpoint:
        checkpoint = load_checkpoint(options["init"])
        config = {"model": "litevae", **{key: COMMON[key] for key in VARIANT}, **checkpoint["config"]}
        config["model"] = config["model"].removesuffix("-variant")
        for key in ("model", *DECODER, *ENCODER):
            if typed.get(key, config.get(key)) != config.get(key):
                held = f"an autoencoder with {flag(key)} {config[key]}" if key in config else "one without"
                raise UsageError(f"{options['init']} holds {held}, not one with {flag(key)} {typed[key]}: leave the "
                                 "option out, or train without --init")
            options[key] = config.get(key, options[key])
    for switch, keys in SWITCHES.items():
        off = options[switch] != "litevae" if switch == "model" else options[switch] == "none"
        for key in keys:
            if off and key in typed:
                raise UsageError(f"{flag(key)} does nothing with {flag(switch)} {options[switch]}: leave it out")
    args = argparse.Namespace(**options)
    check(args)
    return args, checkpoint


def check(args):
    """UsageError for combinations that argparse cannot check."""
    share_of_batch(args)
    smallest = max(SMALLEST[args.discriminator], 16 if args.perceptual != "none" else 8)
    if args.resolution < smallest:
        raise UsageError(f"the discriminator and the perceptual loss need a --resolution of at least {smallest}, "
                         f"got {args.resolution}")
    if args.discriminator == "stylegan" and share_of_batch(args) % 4:
        raise UsageError("--discriminator stylegan compares images in groups of 4: make --batch-size a multiple of 4 "
                         "for each process")
    if args.discriminator != "none" and (args.disc_start or 0) >= args.steps:
        raise UsageError(f"the discriminator's loss would start at step {args.disc_start}, beyond the last of "
                         f"{args.steps}: lower --disc-start, raise --steps, or go without it: --discriminator none")


# --- 3  The step (Eq. 1, Sec. 4.3) --------------------------------------------------------------------


class AutoencoderTask:
    """An autoencoder, its discriminator, and one update of each: what `fit` runs."""

    shown = ["loss", "l1"]
    fields = ["loss", *LOSS_WEIGHTS, "ldl", "recon", "kl_nats", "latent_std", "latent_max", "posterior_std",
              "grad_norm", "lr", "d_loss", "logits_real", "logits_fake", "adv_weight", "grad_ratio", "psnr"]

    def __init__(self, args, machine, vae, held_out, perceptual=None, discriminator=None):
        self.args, self.machine, self.held_out, self.skipped = args, machine, held_out, 0
        betas = (args.beta1, args.beta2)
        self.vae = vae.to(machine.device).train()
        self.ema = EMA(self.vae, args.ema)
        self.optimizer = torch.optim.Adam(self.vae.parameters(), args.lr, betas, fused=True)
        self.perceptual = perceptual and perceptual.to(machine.device)
        self.weights = {name: getattr(args, f"weight_{name}") for name in LOSS_WEIGHTS}
        self.g_loss, self.d_loss = ADVERSARIAL[args.adv_loss]
        self.discriminator, self.d_optimizer = discriminator, None
        if discriminator:
            discriminator.to(machine.device).train()
            self.d_optimizer = torch.optim.Adam(discriminator.parameters(), args.lr, betas, fused=True)
            self.d_parallel = machine.parallel(discriminator)
        if args.compile:
            self.vae.encoder.compile()
            self.vae.decoder.compile()
        self.vae_parallel = machine.parallel(self.vae)

    def step(self, batch, step, log):
        """One update of the autoencoder, one of the discriminator. Returns what is logged, and "finite"."""
        args = self.args
        image = self.machine.images(batch[0])  # (B, 3, H, W) in [-1, 1]
        lr = learning_rate(step, args)

        # Encode, sample, decode. Weights stay in float32, the networks run in bf16 where that is fast.
        B, _, H, W = image.shape
        noise = self.machine.randn((B, self.vae.config.latent_dim, H // 8, W // 8))  # (B, nz, h, w)
        with self.machine.autocast():
            output = self.vae_parallel(image, noise=noise)

        # Eq. 1 and its gradients. The adversarial weight ramps up from 0 over disc_warmup steps.
        fake_logits = self.judge(output.sample) if self.discriminator and step >= args.disc_start else None
        ramp = min(1.0, (step + 1 - args.disc_start) / max(1, args.disc_warmup))
        loss, terms = self.loss(output, image, noise, fake_logits, ramp, log)
        norms = [backward(loss, self.vae, self.optimizer, args.clip)]
        values = {"loss": loss, "grad_norm": norms[0], "lr": lr, **terms}

        # The discriminator, on the same reconstructions; it trains before disc_start, too.
        if self.discriminator and step >= args.disc_start - args.disc_warmup:
            with self.machine.autocast():
                logits = self.d_parallel(torch.cat([image, output.sample.detach()]))  # UNet: (2B, 1), (2B, 1, H, W)
            real = [both[:B] for both in logits]
            fake = [both[B:] for both in logits]
            values["d_loss"] = discriminator_loss(real, fake, self.d_loss)
            norms.append(backward(values["d_loss"], self.discriminator, self.d_optimizer, args.clip))
            values["logits_real"] = sum(logits.mean() for logits in real) / len(real)
            values["logits_fake"] = sum(logits.mean() for logits in fake) / len(fake)

        finite = update([self.optimizer, self.d_optimizer], norms, lr)
        if finite[0]:
            self.ema.update(self.vae)
        values["finite"] = all(finite)
        if log:
            d = output.latent_dist
            values |= {"kl_nats": output.kl_reg, "latent_std": d.mean.std(), "latent_max": d.mean.abs().max(),
                       "posterior_std": d.std.mean()}
        return values

    def loss(self, output, image, noise, fake_logits, ramp, log):
        """Eq. 1: the loss, (), and a dict of its terms. `ramp`, 0 to 1, scales the adversarial weight.

        `noise` and `log` are for AblationTask.
        """
        weights = {**self.weights, "adv": ramp * self.weights["adv"]}
        loss, terms = autoencoder_loss(output, image, weights, self.perceptual, fake_logits, self.g_loss)
        if fake_logits is not None:
            terms["adv_weight"] = weights["adv"]
        return loss, terms

    def judge(self, image):
        """The discriminator's logits, with gradients for the image only."""
        self.discriminator.requires_grad_(False)
        with self.machine.autocast():
            logits = self.discriminator(image)
        self.discriminator.requires_grad_(True)
        return logits

    @torch.no_grad()
    def report(self, step):
        """PSNR of the EMA weights on the held-out images, and a picture of the first eight."""
        psnrs, latents, pairs = [], [], []
        for image, _ in DataLoader(self.held_out, self.args.batch_size):
            image = self.machine.images(image)
            with self.machine.autocast():
                output = self.ema.model(image, sample=False)
            psnrs.append(psnr(output.sample, image))
            latents.append(output.latent.cpu().double())  # (B, nz, h, w)
            pairs += zip(image[:8 - len(pairs)], output.sample)
        # The config stores the factor that gives latents unit variance, as in diffusers.
        self.vae.config.scaling_factor = round(1 / torch.cat(latents).std().item(), 5)
        save_grid(Path(self.args.out, f"reconstructions-{step:06}.png"),
                  [sum(pairs[i:i + 4], ()) for i in range(0, len(pairs), 4)])
        return {"psnr": torch.cat(psnrs).mean().item()}

    def save(self, step):
        training = {"optimizer": self.optimizer.state_dict()["state"], "ema_updates": self.ema.updates,
                    "skipped": self.skipped}
        if self.discriminator:
            training |= {"discriminator": dict(self.discriminator.state_dict()),
                         "d_optimizer": self.d_optimizer.state_dict()["state"]}
        save_checkpoint(Path(self.args.out, "checkpoint.pt"), self.vae, self.ema.model, step=step, training=training,
                        args=vars(self.args))

    def resume(self, checkpoint):
        """Restore everything `save` wrote; returns its step."""
        training = checkpoint["training"]
        self.vae.load_state_dict(checkpoint["model"])
        self.ema.model.load_state_dict(checkpoint["ema"])
        self.ema.updates, self.skipped = training["ema_updates"], training["skipped"]
        load_optimizer(self.optimizer, training["optimizer"])
        if self.discriminator:
            self.discriminator.load_state_dict(training["discriminator"])
            load_optimizer(self.d_optimizer, training["d_optimizer"])
        return checkpoint["step"]


def backward(loss, module, optimizer, clip):
    """New gradients of `loss` in `module`, clipped. Returns their norm, ()."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    return torch.nn.utils.clip_grad_norm_(module.parameters(), clip)


def update(optimizers, norms, lr):
    """Step the optimizers whose gradient norm is finite; those without a norm do not step. Returns which did.

    All norms are read together: the only synchronisation with the GPU in a training step.
    """
    finite = torch.stack(norms).isfinite().tolist()  # the same in every process: gradients were averaged over them
    for optimizer, good in zip(optimizers, finite):
        for group in optimizer.param_groups:
            group["lr"] = lr
        if good:
            optimizer.step()
    return finite


def learning_rate(step, args):
    """Linear warm-up, then constant; over the last --lr-decay of the steps linearly to 0."""
    up, down = (step + 1) / max(1, args.lr_warmup), (args.steps - step) / max(1, args.lr_decay * args.steps)
    return args.lr * min(1.0, up, down)


# --- 4  The loop --------------------------------------------------------------------------------------

MAX_BAD_STEPS = 20  # not finite, in a row


def fit(task, args, machine, dataset, start):
    """The training loop. Returns the exit status: 0, or 128 + the signal's number after Ctrl-C, SIGTERM or SIGHUP.

    task.step(batch, step, log)  one update; returns scalars (all that are logged if `log`) and whether it was "finite"
    task.report(step)            pictures and held-out numbers (main process only); returns scalars
    task.save(step)              writes the checkpoint (main process only)
    task.fields, task.shown      the names of all these scalars, log.csv's columns; those on the progress bar
    task.skipped                 a count, which is raised for each step that is not finite
    """
    main = machine.rank == 0
    stream = batches(dataset, args.batch_size, start, machine, args.workers)
    bad, done, since, images = 0, start, time.monotonic(), 0
    with lock(args.out, main), stop_signals() as stop, progress_bar(args.steps, start, disable=not main) as bar:
        log = CSVLog(Path(args.out, "log.csv"), [*task.fields, "images_per_second", "skipped"], start) if main else None
        while done < args.steps:
            try:
                batch = next(stream)
            except Exception:  # a deleted folder, a killed worker
                if main and done > start and not bad:
                    task.save(done)
                    bar.write(f"saved after step {done}: there were no more images")
                raise
            torch.manual_seed(args.seed * 1_000_003 + done)  # so that all noise resumes exactly
            due = (done + 1) % args.save_every == 0 or done + 1 == args.steps
            logged = (done + 1) % args.log_every == 0 or due or done == 0
            values = task.step(batch, done, logged)
            done, images = done + 1, images + args.batch_size
            bar.update()

            finite = values.pop("finite")
            bad = 0 if finite else bad + 1
            task.skipped += not finite
            if bad == MAX_BAD_STEPS:
                raise UsageError(f"the gradient was not finite in {bad} steps up to step {done}: {way_back(args)}")
            if logged:
                values = machine.mean(values)
            # With several processes this is an all-reduce, so only at logged steps.
            stopped = (logged or machine.world == 1) and machine.any(bool(stop)) and done < args.steps
            good = bad < 2  # one skipped step leaves good weights; after several in a row they may be broken
            report, due = {}, due or stopped
            if main and due:
                if stopped and good:
                    task.save(done)  # at once, for a second signal kills; and again with what the report measures
                report = task.report(done)
                bar.write(f"step {done}: " + ", ".join(f"{name} {value:.4g}" for name, value in report.items()))
            if main and logged:
                values |= {"images_per_second": images / (time.monotonic() - since), "skipped": task.skipped}
                bar.set_postfix_str(", ".join(f"{name} {values[name]:.4g}" for name in task.shown))
                log.write(done, {**values, **report})
                since, images = time.monotonic(), 0
            measured = all(map(math.isfinite, report.values()))
            if main and due:
                if good and measured:
                    task.save(done)
                else:
                    bar.write(f"not saved: step {done} was not finite")
                log.plot()
            if not measured or (done == args.steps and not good):
                raise UsageError(f"what the run holds after step {done} is not finite: {way_back(args)}")
            if stopped:
                if main:
                    bar.write(f"stopped after step {done} of {args.steps}: go on with --resume --out {args.out}")
                machine.wait()  # torchrun ends all processes with the first that leaves
                return 128 + (stop or [signal.SIGTERM])[0]
    return 0


def way_back(args):
    there = Path(args.out, "checkpoint.pt").exists()
    return (f"--resume from the checkpoint in {args.out}" if there else "start again") + " with a lower --lr or " \
        "--precision fp32"


def main(argv=None):
    def work():
        args, checkpoint = parse_args(argv)
        machine = Machine(args.device, args.precision)
        task, dataset, start = prepare(args, machine, checkpoint)
        return fit(task, args, machine, dataset, start)
    return run_script("train.py", work)


def prepare(args, machine, checkpoint):
    """The task, its data set and the step to start from."""
    torch.manual_seed(args.seed)
    dataset, held_out, about = open_images(args, DeadLeaves)
    try:
        vae = LiteVAE.from_checkpoint(checkpoint) if checkpoint else build_autoencoder(config_of(args))
        discriminator = build_discriminator(args)
    except ValueError as error:  # a checkpoint, a resolution or a latent that does not fit
        raise UsageError(str(error))
    check_resolution(vae, args.resolution)
    perceptual = None
    if args.perceptual != "none" and args.weight_perceptual:
        try:
            perceptual = PERCEPTUAL[args.perceptual]()
        except OSError as error:
            raise UsageError(f"{error}; or go without it: --perceptual none")
    trained = (checkpoint or {}).get("training", {}).get("discriminator", {})
    shapes = lambda weights: {name: tensor.shape for name, tensor in weights.items()}  # noqa: E731
    goes_on = discriminator and shapes(trained) == shapes(discriminator.state_dict())
    if goes_on:  # fine-tuning continues with it
        discriminator.load_state_dict(trained)
    # Unspecified: when the adversarial loss starts. Figure 7's axis begins at 40,000 of 200,000 steps; LDM and
    # diffusers start at 50,001: a quarter. A trained discriminator starts at once.
    if args.disc_start is None:
        args.disc_start = 0 if goes_on else args.steps // 4
    if args.disc_warmup is None:
        args.disc_warmup = args.disc_start // 10
    kind = AblationTask if discriminator or args.weight_ldl else AutoencoderTask
    task = kind(args, machine, vae, held_out, perceptual, discriminator)
    start = task.resume(checkpoint) if args.resume else 0
    announce(vae.name, vae, vae.config.latent_dim, about, args, machine, start)
    return task, dataset, start


def config_of(args):
    """The autoencoder's config: what build_autoencoder reads and a checkpoint keeps."""
    config = {key: getattr(args, key) for key in ("model", *DECODER, *ENCODER)}
    if args.model != "litevae":
        return {key: config[key] for key in ("model", *DECODER)}
    if all(config[key] == COMMON[key] for key in VARIANT):
        return {key: config[key] for key in (*DECODER, "size", "use_1x1_conv")}
    return {**config, "model": "litevae-variant", "resolution": args.resolution if args.aggregator == "vit" else None}


def build_discriminator(args):
    if args.discriminator == "none":
        return None
    if args.discriminator == "stylegan":
        return StyleGANDiscriminator(args.resolution, args.disc_channels)
    return {"unet": UNetDiscriminator, "patchgan": PatchDiscriminator}[args.discriminator](args.disc_channels)


# --- 5  Ablations of the step (Tables 8 and 15, Figure 7) ---------------------------------------------


class AblationTask(AutoencoderTask):
    """The step with what Eq. 1 does without: LDL, the adaptive weight of Eq. 2, the gradient ratio of Fig. 7.

    Every run with a discriminator takes it, to log that ratio; the update changes only where an option asks for it.
    """

    def __init__(self, args, *parts):
        if args.compile:  # the gradient ratio walks the graph before backward does: compiled code must keep its buffers
            import torch._functorch.config as functorch
            functorch.donated_buffer = False
        super().__init__(args, *parts)
        self.last_layer = self.vae.decoder.conv_out.weight

    def loss(self, output, image, noise, fake_logits, ramp, log):
        args, average = self.args, self.machine.average
        adversarial = fake_logits is not None
        adaptive = args.adaptive_weight and adversarial
        # With Eq. 2 the adversarial term is added below, once there are gradients to weigh it by.
        loss, terms = super().loss(output, image, noise, fake_logits, 0.0 if adaptive else ramp, log)
        if args.weight_ldl:
            with torch.no_grad(), self.machine.autocast():
                x_ema = self.ema.model(image, noise=noise).sample
            terms["ldl"] = ldl_loss(output.sample, image, x_ema)
            terms["recon"] = terms["recon"] + args.weight_ldl * terms["ldl"]
            loss = loss + args.weight_ldl * terms["ldl"]
        if adaptive:
            terms["adv_weight"] = ramp * adaptive_weight(terms["recon"], terms["adv"], self.last_layer, average=average)
            loss = loss + terms["adv_weight"] * terms["adv"]
        if adversarial and log:
            # Paper: Fig. 7 can only be about the unweighted L_adv, for with the adaptive weight of Eq. 2 the weighted
            # ratio would be 1/2 by construction.
            g_adv, g_recon = gradient_norms((terms["adv"], terms["recon"]), self.last_layer, average)
            terms["grad_ratio"] = g_adv / g_recon.clamp_min(1e-12)
        return loss, terms


# --- 6  Images ----------------------------------------------------------------------------------------
# dataset[position], for positions 0, 1, 2, ... without end, is (image, label): (3, H, W) uint8, and a number, 0
# without classes. It depends on the seed and the position alone: a resumed run sees what it would have seen, and
# ranks need no communication.


def open_images(args, built_in, label=None):
    """The images to train on, those held out, and a description.

    `built_in`, DeadLeaves or Shapes, is what there is without --data. `label`, a function of a file and of the folder
    it was found below, gives the labels. UsageError if there is nothing to read.
    """
    def images(files, root, **how):
        return ImageFolder(files, args.resolution, labels=label and [label(file, root) for file in files], **how)

    files = find_images(args.data) if args.data else []
    candidates, root = (find_images(args.val), args.val) if args.val else (files, args.data)
    if candidates:
        count = HELD_OUT if args.val else min(HELD_OUT, -(-len(files) // 20))
        found = images(candidates, root, augment=False).spread(count)
        held_out = list(found.values())
        checksum = zlib.crc32("\n".join(os.path.relpath(name, root) for name in found).encode(errors="surrogateescape"))
        if getattr(args, "held_out", checksum) != checksum:
            print("Warning: the held-out images are no longer those the run began with: it may have trained on them")
        args.held_out = checksum  # the checkpoint keeps it
    else:
        unseen = built_in(args.resolution, 2**32 - 1)  # a seed no run trains on
        held_out = [unseen[i] for i in range(HELD_OUT)]
    if not args.data:
        return built_in(args.resolution, args.seed), held_out, f"built-in images, {len(held_out)} held out"
    # A --val folder inside --data is left out as a whole.
    left_out = {os.path.realpath(file) for file in (candidates if args.val else found)}
    others = [file for file in files if os.path.realpath(file) not in left_out]
    about = f"{len(others or files)} images of {args.data}, {len(held_out)} held out"
    if not others:
        others, about = files, about + " and trained on too, for there are no others"
    return images(others, args.data, seed=args.seed), held_out, about


IMAGE_SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm",
                  ".pnm", ".jp2", ".avif", ".tga"}


def find_images(folder):
    """Every image below `folder`, once, sorted, suffixes in any case. UsageError if there is none."""
    if not os.path.isdir(folder):
        raise UsageError(f"there is no folder {folder}")
    files, seen = {}, set()
    for root, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in sorted(folders) if os.path.realpath(os.path.join(root, name)) not in seen]
        seen.update(os.path.realpath(os.path.join(root, name)) for name in ["", *folders])
        for name in sorted(names):
            path = os.path.join(root, name)
            if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES and os.path.isfile(path):
                files.setdefault(os.path.realpath(path), path)  # links lead to a file a second time
    if not files:
        raise UsageError(f"{folder} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return sorted(files.values())


class ImageFolder:
    """Image files as a stream: shuffled anew each epoch, cropped and flipped at random if `augment`.

    position -> ((3, resolution, resolution) uint8, label); `labels` holds a number for each file. A file that cannot
    be read is replaced by the next one that can, and printed if it is no image. UsageError if none can be read.
    """

    def __init__(self, files, resolution, seed=0, augment=True, labels=None):
        self.files, self.resolution, self.seed, self.augment = files, resolution, seed, augment
        self.labels = labels or [0] * len(files)
        self.broken = torch.zeros(len(files), dtype=torch.uint8).share_memory_()  # known to all workers
        self[0]  # at least one file must be readable

    def __len__(self):
        return len(self.files)

    def __getitem__(self, position):
        epoch, index = divmod(position, len(self.files))
        if self.augment:
            index = int(permutation(len(self.files), self.seed, epoch)[index])
        return self.first_readable(index, position)[1]

    def first_readable(self, index, position=None):
        """The first file from `index` on that can be read, and its item; `position` seeds the augmentation."""
        for attempt in range(len(self.files)):
            candidate = (index + attempt) % len(self.files)
            if self.broken[candidate]:
                continue
            file = self.files[candidate]
            # A new generator for each attempt: the crop is the same whether a broken file is found now or was known.
            rng = np.random.default_rng((self.seed, 1, position)) if self.augment else None
            try:
                return file, (as_tensor(load_image(file, self.resolution, rng)), self.labels[candidate])
            except NotAnImage as error:
                self.broken[candidate] = 1
                tqdm.write(f"skipped, cannot be read: {file} ({error})")
            except OSError:  # cannot be opened now: perhaps it can later
                pass
        raise UsageError(f"none of the {len(self.files)} images can be read, {self.files[0]} for one")

    def spread(self, count):
        """{file: item} of `count` files evenly spaced over all, so that no class of a sorted folder is alone."""
        return dict(self.first_readable(i * len(self.files) // count) for i in range(count))


class DeadLeaves:
    """An endless stream of synthetic photographs: position -> ((3, resolution, resolution) uint8, 0)."""

    def __init__(self, resolution, seed):
        self.resolution, self.seed = resolution, seed

    def __getitem__(self, position):
        return as_tensor(dead_leaves(self.resolution, np.random.default_rng((self.seed, position)))), 0


class Shapes(DeadLeaves):
    """An endless stream of single objects: position -> ((3, resolution, resolution) uint8, its class)."""

    def __getitem__(self, position):
        rng = np.random.default_rng((self.seed, position))
        label = int(rng.integers(len(SHAPES)))
        return as_tensor(shape(list(SHAPES)[label], self.resolution, rng)), label


@functools.lru_cache(maxsize=4)
def permutation(n, seed, epoch):
    """The order in which an epoch takes `n` things."""
    return np.random.default_rng((seed, epoch)).permutation(n)


def load_image(path, resolution, rng=None):
    """The file as (resolution, resolution, 3) uint8 RGB: a random crop and flip with `rng`, else the centre.

    Reduced (or, where it is smaller, enlarged) first. Errors are open_rgb's.
    """
    # Unspecified: augmentation. As in ADM's code: the crop takes 80 to 100 % of the shorter side.
    short = int(resolution if rng is None else rng.integers(resolution, int(resolution / 0.8) + 1))
    image = open_rgb(path, short)
    scale = short / min(image.size)
    width, height = [max(resolution, round(side * scale)) for side in image.size]
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    x, y = (width - resolution) // 2, (height - resolution) // 2
    if rng is not None:
        x, y = rng.integers(width - resolution + 1), rng.integers(height - resolution + 1)
    pixels = np.asarray(image.crop((x, y, x + resolution, y + resolution)))
    return pixels[:, ::-1] if rng is not None and rng.random() < 0.5 else pixels


class NotAnImage(Exception):
    """A file that was read and is no image, or a damaged one."""


def open_rgb(path, short=None):
    """The file as a PIL image in RGB, at its own size; with `short`, JPEGs may come smaller, down to that side.

    Grey, palette, alpha (on white), 16-bit and EXIF-rotated files come out as RGB the right way up. OSError for a file
    that cannot be opened, NotAnImage for one that cannot be decoded.
    """
    content = Path(path).read_bytes()
    try:
        image = Image.open(io.BytesIO(content))
        if short:
            image.draft("RGB", (short, short))  # JPEG: decode at 1/2, 1/4 or 1/8 if that is still enough
        image = ImageOps.exif_transpose(image)
        if image.mode == "F":
            raise ValueError("floating-point pixels, whose range is unknown")
        if image.mode.startswith("I"):  # 16-bit grey, which PIL would clip
            image = Image.fromarray((np.asarray(image).astype(np.float32) / 257).clip(0, 255).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except UnidentifiedImageError:
        raise NotAnImage("it is no image that PIL knows") from None
    except Exception as error:  # PIL raises a dozen kinds for a dozen kinds of damage
        raise NotAnImage(one_line(error)) from None


def as_tensor(pixels):
    """(H, W, 3) uint8 -> (3, H, W) uint8 tensor."""
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


# --- 7  PSNR, grids and plots -------------------------------------------------------------------------


def to_pixels(x):
    """[-1, 1] -> [0, 1], clamped: the one place where images are clamped before they are judged."""
    return ((x.float() + 1) / 2).clamp(0, 1)


def psnr(x_hat, x):
    """Peak signal-to-noise ratio in dB for each image, over [0, 1]: two (B, 3, H, W) in [-1, 1] -> (B,)."""
    mse = (to_pixels(x_hat) - to_pixels(x)).square().mean(dim=(1, 2, 3))
    return -10 * torch.log10(mse.clamp_min(1e-12))


def save_grid(path, rows, gap=2):
    """Write a PNG of `rows`, each a list of (3, H, W) images in [-1, 1], with white gaps; small images enlarged."""
    zoom = max(1, 128 // rows[0][0].shape[-1])
    columns = max(len(row) for row in rows)
    lines = []
    for row in rows:
        row = [*row, *[torch.ones_like(row[0])] * (columns - len(row))]  # a short last row
        tiles = [to_pixels(x.cpu()).repeat_interleave(zoom, 1).repeat_interleave(zoom, 2) for x in row]
        lines.append(torch.cat([F.pad(tile, (0, gap, 0, gap), value=1.0) for tile in tiles], dim=2))
    grid = torch.cat(lines, dim=1)[:, :-gap, :-gap]
    Image.fromarray((grid * 255).round().byte().permute(1, 2, 0).numpy()).save(path)


COLOURS = ["#0b5fa5", "#d1495b", "#2e8b57", "#e08e0b", "#7a4fa3", "#555555"]


def plot(path, panels, x_title, even=False):
    """Write a PNG of line plots: {title: {label: [(x, y), ...]}}; with `even` all x are spaced evenly."""
    font, small = ImageFont.load_default(20), ImageFont.load_default(16)
    width, height, left, top, bottom = 420, 340, 80, 50, 50
    labels = list(dict.fromkeys(label for lines in panels.values() for label in lines if label))
    colours = dict(zip(labels or [""], COLOURS * (1 + len(labels))))
    canvas = Image.new("RGB", (max(2, len(panels)) * width, height + 10 + 30 * len(labels)), "white")
    draw = ImageDraw.Draw(canvas)
    for panel, (title, lines) in enumerate(panels.items()):
        xs = sorted({x for points in lines.values() for x, _ in points})
        ys = [y for points in lines.values() for _, y in points]
        margin = 0.08 * (max(ys) - min(ys)) or abs(max(ys)) * 0.1 or 1.0
        low, high = min(ys) - margin, max(ys) + margin
        x0, x1, y0, y1 = width * panel + left, width * (panel + 1) - 20, height - bottom, top
        across = lambda x: x0 + (x1 - x0) * ((xs.index(x) + 0.5) / len(xs) if even else x / xs[-1])  # noqa: E731
        up = lambda y: y0 + (y1 - y0) * (y - low) / (high - low)  # noqa: E731
        draw.text(((x0 + x1) / 2, top / 2), title, "black", font, anchor="mm")
        for tick in np.linspace(low + margin, high - margin, 4):
            draw.line([(x0, up(tick)), (x1, up(tick))], "#dddddd")
            draw.text((x0 - 8, up(tick)), f"{tick:.3g}", "black", small, anchor="rm")
        for x in xs if even else [xs[-1] * i // 4 for i in range(1, 5)]:
            draw.text((across(x), y0 + 16), str(x), "black", small, anchor="mm")
        draw.text(((x0 + x1) / 2, y0 + 38), x_title, "black", small, anchor="mm")
        draw.line([(x0, y1), (x0, y0), (x1, y0)], "black", 2)
        for label, points in lines.items():
            draw.line([(across(x), up(y)) for x, y in points], colours[label], 3)
            for x, y in points if len(points) <= 20 else []:
                draw.ellipse([across(x) - 5, up(y) - 5, across(x) + 5, up(y) + 5], colours[label])
    for i, label in enumerate(labels):
        y = height + 30 * i + 20
        draw.line([(left, y), (left + 40, y)], colours[label], 4)
        draw.text((left + 50, y), label, "black", small, anchor="lm")
    canvas.save(path)


# --- 8  The machine -----------------------------------------------------------------------------------


def batches(dataset, batch_size, start, machine, workers, count=sys.maxsize):
    """This process's share of batches `start`, `start + 1`, ... of a stream that ends after `count` items, or never."""
    workers = machine.workers(workers)
    share = batch_size // machine.world
    mine = range(machine.rank * share, (machine.rank + 1) * share)
    positions = ([first + i for i in mine] for first in range(start * batch_size, count, batch_size))
    return iter(DataLoader(dataset, batch_sampler=positions, num_workers=workers, worker_init_fn=ignore_signals,
                           pin_memory=machine.device.type == "cuda", prefetch_factor=4 if workers else None))


class Machine:
    """Where and how this process computes: device, precision, and its share among `world` processes."""

    def __init__(self, device=None, precision="auto"):
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        if self.world > 1 and device == "cuda":
            device = f"cuda:{os.environ['LOCAL_RANK']}"  # one GPU for each process
        try:
            self.device = torch.device(device)
            torch.zeros(1, device=self.device)
        except (RuntimeError, AssertionError):
            raise UsageError(f"the device {device} cannot be used here: choose another with --device, or leave it out")
        cuda = self.device.type == "cuda"
        if cuda and self.device.index is not None:
            torch.cuda.set_device(self.device)
        if self.world > 1:
            dist.init_process_group("nccl" if cuda else "gloo")
        # bf16 has float32's range, so it needs no loss scaling; older GPUs and CPUs only emulate it, slowly.
        fast = cuda and torch.cuda.get_device_capability(self.device) >= (8, 0)
        if self.device.type == "cpu":
            has = getattr(torch.cpu, "get_capabilities", dict)()
            fast = has.get("avx512_bf16", False) or has.get("amx_bf16", False)
        self.bf16 = fast if precision == "auto" else precision == "bf16"
        if cuda:
            torch.set_float32_matmul_precision("high")  # TF32 for what stays in float32
            torch.backends.cudnn.benchmark = True

    def autocast(self):
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16)

    def images(self, batch):
        """(B, 3, H, W) uint8 from the loader -> float in [-1, 1] on the device."""
        return batch.to(self.device, non_blocking=True).float() / 127.5 - 1

    def workers(self, asked):
        """How many processes load images: `asked`, if it is not None."""
        # On a CPU the networks need every core, and a third busy process on two of them stalls both.
        default = 0 if self.device.type == "cpu" else min(8, os.cpu_count() or 1)
        return default if asked is None else asked

    def randn(self, shape):
        """Standard normal noise for this process's rows of the global batch: the same for any `world`.

        From torch's CPU generator, which `fit` seeds alike in every process before each step.
        """
        rows = shape[0]
        noise = torch.randn((rows * self.world, *shape[1:]))[self.rank * rows:(self.rank + 1) * rows]
        if self.device.type == "cuda":
            noise = noise.pin_memory()  # a copy from other memory waits for the GPU
        return noise.to(self.device, non_blocking=True)

    def parallel(self, module):
        """`module`, with gradients averaged over the processes if there are several."""
        if self.world == 1:
            return module
        return DistributedDataParallel(module, broadcast_buffers=False)

    def average(self, tensor):
        """`tensor`, averaged over the processes."""
        if self.world == 1:
            return tensor
        tensor = tensor.to(self.device)
        dist.all_reduce(tensor)
        return tensor / self.world

    def mean(self, values):
        """A dict of scalars, averaged over the processes, as floats."""
        tensor = torch.stack([torch.as_tensor(v, dtype=torch.float32, device=self.device) for v in values.values()])
        return dict(zip(values, self.average(tensor).tolist()))

    def any(self, flag):
        """Whether `flag` is true in any process."""
        return self.average(torch.tensor(float(flag))).item() > 0

    def wait(self):
        """Return once every process has come here."""
        self.any(False)

    def gather(self, tensor):
        """The tensors of all processes, one after the other along the first dimension."""
        if self.world == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.world)]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    def now(self):
        """Seconds on a clock, once the device has done all it was given."""
        getattr(torch, self.device.type).synchronize()
        return time.perf_counter()


# --- 9  Around the loop -------------------------------------------------------------------------------

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


def ignore_signals(worker):
    # Signals reach every process of a terminal or a job; the main one decides when to stop.
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class UsageError(Exception):
    """Invalid input, printed without a traceback."""


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UsageError(f"{message} (--help lists every option)")


def flag(key):
    return "--" + key.replace("_", "-")


def share_of_batch(args):
    """Images a step for each process. UsageError if they cannot share the batch evenly."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if args.batch_size % world:
        raise UsageError(f"--batch-size {args.batch_size} cannot be shared by {world} processes: make it a multiple")
    return args.batch_size // world


def load_optimizer(optimizer, state):
    """Take up the moments of a checkpoint; learning rate and the like come from the arguments. CheckpointError."""
    for i, p in enumerate(optimizer.param_groups[0]["params"]):  # fused Adam does not look at shapes
        if i in state and any(state[i][name].shape != p.shape for name in ("exp_avg", "exp_avg_sq")):
            raise CheckpointError("the optimiser's state in the checkpoint is not that of its model")
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def progress_bar(total, start=0, **how):
    """tqdm's, which off a terminal shows itself every ten seconds."""
    return tqdm(total=total, initial=start, mininterval=0.5 if sys.stderr.isatty() else 10, dynamic_ncols=True, **how)


class EMA:
    """Exponential moving average of a model's weights, in a copy of the model: `.model`."""

    def __init__(self, model, decay):
        self.model, self.decay, self.updates = copy.deepcopy(model).eval().requires_grad_(False), decay, 0

    @torch.no_grad()
    def update(self, model):
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))  # shorter at first
        torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), 1 - decay)
        self.updates += 1


@contextlib.contextmanager
def stop_signals():
    """A list that Ctrl-C, SIGTERM and SIGHUP go into: a run finishes its step and saves. A second one kills."""
    received = []

    def note(number, frame):
        received.append(number)
        signal.signal(number, signal.SIG_DFL)

    wanted = [n for n in SIGNALS if n == signal.SIGINT or signal.getsignal(n) != signal.SIG_IGN]  # nohup ignores SIGHUP
    before = {number: signal.signal(number, note) for number in wanted}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def lock(folder, wanted=True):
    """Keeps other runs out of a folder; the system releases it however this run ends. UsageError if there is one."""
    with contextlib.ExitStack() as stack:
        if wanted and os.name == "posix":
            import fcntl  # not on Windows
            handle = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, handle)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UsageError(f"another run is writing into {folder}: choose another --out")
        yield


class CSVLog:
    """log.csv: one row a logged step; curves.png: each column over the steps.

    A resumed run drops the rows that its checkpoint has not seen. A file that is not this log's is kept aside.
    """

    def __init__(self, path, fields, start):
        self.path, self.fields, self.rows = Path(path), ["step", *fields], []
        if start and self.path.exists():
            try:
                with open(self.path, newline="") as file:
                    self.rows = [row for row in csv.DictReader(file) if int(row["step"]) <= start]
            except (KeyError, TypeError, ValueError, csv.Error):
                aside = self.path.with_name(f"log-before-{start}.csv")
                os.replace(self.path, aside)
                print(f"{self.path} was edited and is no log of this run any more: it is kept as {aside}")
        partial = self.path.with_suffix(".csv.partial")
        with open(partial, "w", newline="") as file:
            writer = csv.DictWriter(file, self.fields, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(self.rows)
        os.replace(partial, self.path)

    def write(self, step, values):
        row = {"step": step, **{k: f"{v:.6g}" for k, v in values.items()}}
        self.rows.append(row)
        with open(self.path, "a", newline="") as file:
            csv.DictWriter(file, self.fields).writerow(row)

    def plot(self):
        """Draw the loss and what reports measure over the steps."""
        panels = {}
        for name in ("loss", "grad_ratio", "psnr", "val_loss"):
            points = [(int(row["step"]), float(row[name])) for row in self.rows if row.get(name)]
            points = [(step, value) for step, value in points if math.isfinite(value)]
            if points:
                panels[name] = {"": points}
        if panels:
            plot(self.path.with_name("curves.png"), panels, "step")


def announce(name, model, nz, about, args, machine, start):
    """The run in one line; and the folder it writes into."""
    if machine.rank == 0:
        Path(args.out).mkdir(parents=True, exist_ok=True)
        size, side = args.resolution, args.resolution // 8
        millions = sum(p.numel() for p in model.parameters()) / 1e6
        print(f"{name}, {millions:.2f} M parameters, latent {side}x{side}x{nz}; {about}, at {size}x{size}; "
              f"{machine.device}, {'bf16' if machine.bf16 else 'fp32'}; steps {start} to {args.steps}; all goes to "
              f"{args.out}", flush=True)


def check_resolution(vae, resolution):
    """UsageError if the autoencoder takes images of another resolution alone, as with a ViT aggregator."""
    side = vae.config.get("resolution") or resolution
    if side != resolution:
        raise UsageError(f"the autoencoder has a ViT aggregator, which takes images of {side}x{side} alone (Table 20), "
                         f"not of {resolution}x{resolution}")


def run_script(name, work):
    """work(), whose exit status is returned; invalid input becomes one sentence and status 1, Ctrl-C status 130."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # file names that a terminal cannot print
    try:
        return work()
    except (UsageError, CheckpointError, OSError, MemoryError, RuntimeError) as error:
        words = ("out of memory", "not enough memory", "allocate memory")  # CUDA's and MPS's, CPUs'
        full = isinstance(error, MemoryError) or any(some in str(error) for some in words)
        if isinstance(error, RuntimeError) and not full:
            raise
        if int(os.environ.get("RANK", 0)) == 0:
            advice = ": lower --batch-size, --size or --resolution" if full else ""
            print(f"{name}: {one_line(error)}{advice}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # before or after the loop, which has its own way to stop
        print(f"{name}: stopped", file=sys.stderr)
        return 130
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


# --- 10  Built-in images ------------------------------------------------------------------------------


def dead_leaves(size, rng):
    """A synthetic photograph: (size, size, 3) uint8, drawn from `rng` alone.

    Opaque leaves with a power law of sizes fall on one another. That gives the edges, the occlusions and the scale
    invariance of natural images (Lee, Mumford & Huang 2001). Noise on the leaves keeps the amplitude spectrum near
    1/f (Field 1987). Clutter, shapes, contrast, white balance and saturation are drawn once an image.

    Colours are stronger than in photographs, where green to magenta has 2 % of luminance's variance and short runs do
    not learn it. It is 1.5 times as strong on the leaves and 4 times in the white balance, red to blue 1.5 times there.
    """
    # The leaves: a few large ones first (ground, sky, walls), then radii r with p(r) ~ r^-3, small ones last.
    r_min, r_max = np.exp(rng.uniform(np.log(1.2), np.log(14))), 0.8 * size
    small = int(min(rng.uniform(0.2, 2.2) * (size / r_min) ** 2 / 4, 1.5 * size))  # capped: time is linear
    radius = np.sort((r_min**-2 + rng.random(small) * (r_max**-2 - r_min**-2)) ** -0.5)[::-1]
    radius = np.concatenate([size * rng.uniform(0.3, 1.3, rng.integers(2, 8)), radius])
    n = len(radius)
    centre = rng.uniform(-0.15, 1.15, (n, 2)) * size  # y, x
    angle, aspect = rng.uniform(0, np.pi, n), np.exp(-np.abs(rng.normal(0, 0.7, n)))
    box = rng.random(n) < rng.uniform(0.15, 0.75)  # the others are ellipses

    # The number of the leaf that is seen, at twice the resolution; each leaf within a square around it.
    owner = np.zeros((2 * size, 2 * size), dtype=int)
    axis = (np.arange(2 * size) + 0.5) / 2
    for k in range(1, n):
        corners = 2 * (centre[k] + 1.42 * radius[k] * np.array([[-1], [1]]))
        (y0, x0), (y1, x1) = np.clip(corners, 0, 2 * size).astype(int)
        y = (axis[y0:y1, None] - centre[k, 0]) / radius[k]
        x = (axis[x0:x1] - centre[k, 1]) / radius[k]
        u = x * np.cos(angle[k]) + y * np.sin(angle[k])
        v = (y * np.cos(angle[k]) - x * np.sin(angle[k])) / aspect[k]
        inside = np.maximum(np.abs(u), np.abs(v)) < 1 if box[k] else u * u + v * v < 1
        owner[y0:y1, x0:x1][inside] = k

    # What each leaf looks like, (n, 4): luminance, red to blue, green to magenta; strength of its clouds.
    white_balance = rng.normal([0.45, 0.04, 0.0], [0.06, 0.0675, 0.072])
    saturation = rng.lognormal(0.2, 0.65)
    spread = [0.26 * rng.lognormal(0, 0.33), 0.06 * saturation, 0.03 * saturation]
    clouds = np.minimum(0.08 * rng.lognormal(-0.3, 0.9) * rng.lognormal(0, 1.2, (n, 1)), 0.35)
    look = np.concatenate([white_balance + rng.normal(size=(n, 3)) * spread, clouds], axis=1)
    pixel = look[owner].reshape(size, 2, size, 2, 4).mean(axis=(1, 3))  # (size, size, 4), antialiased
    luminance, red_blue, green, clouds = np.moveaxis(pixel, -1, 0)
    light = np.exp(np.clip(clouds * noise_field(size, rng.uniform(1.0, 1.6), rng), -2, 1))
    luminance = np.clip(luminance, 0.03, 1) * light
    image = np.stack([luminance + red_blue - green, luminance + green, luminance - red_blue - green], axis=-1)
    image = scipy.ndimage.gaussian_filter(image, (0.4, 0.4, 0))
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)


def noise_field(size, slope, rng):
    """(size, size) noise of unit variance with amplitude spectrum 1/f^slope."""
    f = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)) + 0.5 / size  # above 0
    field = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((size, size))) / f**slope, s=(size, size))
    return (field - field.mean()) / field.std()


def polygon(x, y, corners, inner):
    """Inside a star of that many corners, its tips at radius 1 and its inner corners at `inner`; one tip is on top."""
    half = np.pi / corners
    angle = np.abs((np.arctan2(x, -y) + half) % (2 * half) - half)  # from the nearest tip: 0 to half
    u, v = np.hypot(x, y) * np.cos(angle), np.hypot(x, y) * np.sin(angle)
    # Below the line from the tip, (1, 0), to the inner corner.
    return v * (1 - inner * np.cos(half)) < (1 - u) * inner * np.sin(half)


# Where a shape of radius 1 is, of points (x, y); y points down.
SHAPES = {
    "disc": lambda x, y: x**2 + y**2 < 0.8,
    "ring": lambda x, y: (x**2 + y**2 < 0.9) & (x**2 + y**2 > 0.35),
    "square": lambda x, y: np.maximum(np.abs(x), np.abs(y)) < 0.72,
    "triangle": lambda x, y: polygon(x, y, 3, 0.5),
    "star": lambda x, y: polygon(x, y, 5, 0.42),
    "cross": lambda x, y: (np.minimum(np.abs(x), np.abs(y)) < 0.28) & (np.maximum(np.abs(x), np.abs(y)) < 0.9),
    "moon": lambda x, y: (x**2 + y**2 < 0.9) & ((x - 0.55) ** 2 + y**2 > 0.6),
    "heart": lambda x, y: (x**2 + (1.1 * y + 0.6 * np.abs(x) ** 0.66 - 0.1) ** 2) < 0.75,
}


def shape(name, size, rng):
    """One object of SHAPES on a calm ground: (size, size, 3) uint8, drawn from `rng` alone.

    Place, size, angle, both colours and their shading vary. The colours differ enough to be told apart, and are no
    more vivid than those of dead_leaves, which are what an autoencoder trained on built-in images has seen.
    """
    radius = size * rng.uniform(0.31, 0.43)
    cx, cy = rng.uniform(radius, size - radius, 2)
    angle = rng.uniform(-0.25, 0.25)
    while True:
        ground, colour = rng.uniform(0.1, 0.9, (2, 3)) @ (np.eye(3) + 1 / 3) / 2  # half way to grey
        if np.linalg.norm(ground - colour) > 0.5:
            break
    # Three samples a pixel along each axis, whose mean antialiases the border.
    y, x = (np.mgrid[:3 * size, :3 * size] + 0.5) / 3
    u, v = (x - cx) / radius, (y - cy) / radius
    inside = SHAPES[name](u * np.cos(angle) + v * np.sin(angle), v * np.cos(angle) - u * np.sin(angle))
    cover = inside.reshape(size, 3, size, 3).mean(axis=(1, 3))[..., None]  # (size, size, 1)
    light = rng.normal(0, 0.15, (2, 2)) @ (np.mgrid[:size, :size].reshape(2, -1) / size - 0.5)  # of both, linear
    light = 1 + light.reshape(2, size, size, 1)
    image = (1 - cover) * ground * light[0] + cover * colour * light[1]
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)


if __name__ == "__main__":
    sys.exit(main())
