"""Train LiteVAE: on built-in images in minutes, or on a folder of your own.

    python train.py                                             the quick start: LiteVAE-S, built-in images
    python train.py --data DIR --out runs/mine                  the paper's recipe: LiteVAE-B at 128x128
    python train.py --data DIR --init runs/mine/checkpoint.pt --resolution 256 --steps 50000 --out runs/mine-256
                                                                fine-tuning at 256 (Sec. 4.3, Table 5)
    python train.py --data DIR --model sd-vae --out runs/sd     what the paper compares with: see the groups below
    python train.py --out runs/mine --resume                    resume a run, bit-exactly on a CPU
    torchrun --nproc_per_node=2 train.py --data DIR             one run on two processes or GPUs

A run writes into --out:  checkpoint.pt  (weights, EMA weights, optimisers, step),  log.csv  (every logged value)  and
reconstructions-STEP.png  (held-out images beside their reconstructions).

From top to bottom, each function below the one that calls it:

    1  The two recipes         QUICK_START, PAPER
    2  Options                 main, parse_args, build_parser
    3  The loop                prepare, fit
    4  The step                AutoencoderTask: Eq. 1 and the discriminator
    The method ends here. Below are its parts, and what every training script needs:
    5  What options choose     config_of, AblationTask
    6  Images                  open_images, find_images, ImageFolder, DeadLeaves, Shapes, load_image
    7  PSNR and grids          psnr, save_grid
    8  The machine             batches, Machine: device, precision, processes
    9  Around the loop         EMA, signals, log, run_script
   10  Built-in images         dead_leaves, shape
"""

import argparse
import copy
import csv
import functools
import itertools
import math
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import scipy.ndimage
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from litevae import (CHECKPOINT_FORMAT, DWT_LATENTS, LOSS_WEIGHTS, LPIPS, PRESETS, CheckpointError, ESRGANPerceptual,
                     LiteVAE, PatchDiscriminator, StyleGANDiscriminator, UNetDiscriminator, adaptive_weight,
                     autoencoder_loss, build_autoencoder, discriminator_loss, gradient_norms, hinge_d_loss,
                     hinge_g_loss, ldl_loss, load_checkpoint, logistic_d_loss, logistic_g_loss, one_line,
                     save_checkpoint)

# --- 1  The two recipes -------------------------------------------------------------------------------

# Shared by both recipes: ablation options and run options.
COMMON = dict(
    data=None, val=None, init=None, resume=False, seed=0, workers=None, device=None, precision="auto", compile=False,
    clip=1.0, model="litevae", use_1x1_conv=False, extractor="unet", shared_extractor=False, aggregator="unet",
    last_two_levels=False, weight_ldl=0.0, adv_loss="hinge", adaptive_weight=False, grad_ratio=False, disc_channels=64,
    disc_start=None, disc_warmup=None,
    **{f"weight_{name}": weight for name, weight in LOSS_WEIGHTS.items()})

# What `python train.py` runs: tuned for the PSNR that a few minutes on two CPU cores can reach. Many steps on small
# batches of small crops, and a learning rate that decays to 0. Predicting wavelets removes the decoder's costliest
# stage. The squared error teaches colours early (see mse_loss), and a low wavelet weight leaves it and L1 the lead. An
# SMC decoder does not normalise its input, and at this learning rate latents can diverge: a longer warm-up and 300
# times LDM's KL weight prevent it.
QUICK_START = dict(
    COMMON,
    size="S", latent_dim=12, decoder_channels=16, output_type="wavelet", use_smc=True,
    resolution=48, batch_size=4, steps=1490,
    lr=3e-3, beta1=0.9, beta2=0.99, lr_warmup=200, lr_decay=0.7, ema=0.99,
    perceptual="none", weight_mse=10.0, weight_wavelet=0.1, weight_gaussian=0.0, weight_kl=3e-4,
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
DISCRIMINATORS = {
    "unet": lambda args: UNetDiscriminator(args.disc_channels),
    "stylegan": lambda args: StyleGANDiscriminator(args.resolution, args.disc_channels),
    "patchgan": lambda args: PatchDiscriminator(args.disc_channels),
    "none": lambda args: None}
ADVERSARIAL = {"hinge": (hinge_g_loss, hinge_d_loss), "logistic": (logistic_g_loss, logistic_d_loss)}

# Options stored in the autoencoder's config: of every model's decoder, and of LiteVAE's encoder.
DECODER = ("latent_dim", "decoder_channels", "output_type", "use_smc")
VARIANT = ("extractor", "shared_extractor", "aggregator", "last_two_levels")
ENCODER = ("size", "use_1x1_conv", *VARIANT)

# {option: the options that do nothing where it is "none", or where --model is not litevae}
SWITCHES = {"model": ENCODER, "perceptual": ("weight_perceptual",), "discriminator": (
    "disc_channels", "disc_start", "disc_warmup", "adv_loss", "weight_adv", "adaptive_weight", "grad_ratio")}

HELD_OUT = 64  # images at most
TRAINED = Path(__file__).with_name("assets") / "litevae-s.pt"  # to try; assets/results.md says how it was trained


# --- 2  Options ---------------------------------------------------------------------------------------


def main(argv=None):
    args, checkpoint = parse_args(argv)
    machine = Machine(args.device, args.precision)
    return fit(*prepare(args, machine, checkpoint))


def parse_args(argv=None):
    """The options of the command line as a namespace, and the checkpoint of --resume or --init, or None."""
    typed = vars(build_parser().parse_args(argv))
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
    if "disc_start" in typed and args.disc_start >= args.steps:
        raise UsageError(f"the discriminator's loss would start at step {args.disc_start}, beyond the last of "
                         f"{args.steps}: lower --disc-start, raise --steps, or go without it: --discriminator none")
    smallest = 24 if args.discriminator == "patchgan" else 16
    if args.resolution < smallest and {args.discriminator, args.perceptual} != {"none"}:
        raise UsageError(f"the discriminator and the perceptual loss need a --resolution of at least {smallest}")
    groups = 4 * int(os.environ.get("WORLD_SIZE", 1))
    if args.discriminator == "stylegan" and args.batch_size % groups:
        raise UsageError("--discriminator stylegan compares images in groups of 4: make --batch-size a multiple of "
                         f"{groups}")
    return args, checkpoint


# Options that --resume may change; all others stay.
CHANGEABLE = {"steps", "save_every", "log_every", "workers", "device", "precision", "compile", "data", "val", "lr",
              "clip", "resume", "out"}


def merge(typed, recipe, format=CHECKPOINT_FORMAT):
    """A recipe's options, or with --resume the run's, updated by those typed; and the run's checkpoint or None."""
    path = Path(typed["out"], "checkpoint.pt")
    if not typed.get("resume"):
        if path.exists():
            raise UsageError(f"{typed['out']} already holds a run: go on with --resume, or choose another --out")
        return {**recipe, **typed}, None
    checkpoint = load_checkpoint(path, format)
    try:
        kept, done = {**recipe, **checkpoint["args"]}, int(checkpoint["step"])  # it may be older than an option
    except (KeyError, TypeError, ValueError):
        raise UsageError(f"{path} holds a model but no training state: it cannot be resumed")
    for key in typed.keys() - CHANGEABLE:
        if typed[key] != kept.get(key):
            raise UsageError(f"the run in {typed['out']} was started with {flag(key)} {kept.get(key)}, not "
                             f"{typed[key]}: a resumed run keeps it, so leave the option out")
    options = {**kept, **typed}
    if done >= options["steps"]:
        raise UsageError(f"the run in {typed['out']} has done its {done} steps: raise --steps to go on")
    return options, checkpoint


def build_parser():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    group = functools.partial(option_group, parser, quick=QUICK_START, data=PAPER)
    add_training_options(group)
    add = group("start")
    add("--init", type=filename, help="checkpoint whose EMA weights and discriminator training starts from; or a "
        "released Stable Diffusion autoencoder (default: random weights)")

    add = group("Tables 1, 2, 11, 12, 13 and 22: the autoencoder")
    add("--model", choices=["litevae", "sd-vae", "vae-small", "dwt", "dwt-2"], help="LiteVAE; Stable Diffusion's; "
        "Stable Diffusion's with a small encoder; a wavelet transform instead of an encoder")
    add("--size", choices=list(PRESETS), help="size of LiteVAE's encoder, Tables 23 and 24")
    add("--latent-dim", type=positive_int, help="channels of the latent; dwt has 12, dwt-2 has 48")
    add("--decoder-channels", type=positive_int, help="width of the decoder; 128 is Stable Diffusion's")
    add("--output-type", choices=["image", "wavelet"], help="what the decoder predicts")
    add = group("Table 4 and Figure 8: normalisation in the decoder")
    add("--use-smc", action=SWITCH, help="self-modulated convolutions instead of GroupNorm, Sec. 4.2")
    add = group("Table 17: 1x1 convolutions around the latent")
    add("--use-1x1-conv", action=SWITCH, help="a 1x1 convolution after the encoder and one before the decoder")
    add = group("Tables 18 to 21: the parts of LiteVAE's encoder")
    add("--extractor", choices=["unet", "nafnet"], help="Table 18: the network that extracts a level's features")
    add("--shared-extractor", action=SWITCH, help="Table 19: one extractor for all levels")
    add("--aggregator", choices=["unet", "vit"], help="Table 20: the network that joins the features of all levels; "
        "vit works at one resolution only")
    add("--last-two-levels", action=SWITCH, help="Table 21: leave out the level of the highest resolution")

    add = group("Eq. 1, Tables 8 and 9: weights of the losses; 0 leaves a loss out")
    for loss in LOSS_WEIGHTS:
        add(f"--weight-{loss}", type=non_negative, help=f"weight of the {loss} loss")
    add = group("Table 14: perceptual loss")
    add("--perceptual", choices=[*PERCEPTUAL, "none"], help="LPIPS, or ESRGAN's VGG features before their activation")
    add = group("Table 15: locally discriminative learning")
    add("--weight-ldl", type=non_negative, help="weight of the LDL loss, 1 in its paper; 0 leaves it out")
    add = group("Table 10: discriminator")
    add("--discriminator", choices=list(DISCRIMINATORS), help="stylegan is StyleGAN2's")
    add("--disc-channels", type=positive_int, help="channels of the discriminator at full resolution")
    add("--disc-start", type=natural, help="step from which the adversarial loss counts (default: a quarter of "
        "--steps, or 0 if --init brings a trained discriminator)")
    add("--disc-warmup", type=natural, help="steps that the discriminator trains before that, and over which the "
        "weight of the adversarial loss then rises from 0 (default: a tenth of --disc-start)")
    add = group("Table 16: adversarial loss")
    add("--adv-loss", choices=list(ADVERSARIAL), help="loss of both players; logistic is the non-saturating one")
    add = group("Table 8 and Figure 7: weight of the adversarial loss")
    add("--adaptive-weight", action=SWITCH, help="the adaptive weight of Eq. 2 instead of --weight-adv")
    add("--grad-ratio", action=SWITCH, help="log the norm of the adversarial loss's gradient over that of the "
        "reconstruction's, at the decoder's last layer, as in Figure 7")
    return parser


def add_training_options(group):
    """The options of every training script."""
    add = group("run")
    add("--data", type=filename, help="folder of images to train on, searched recursively (default: built-in images)")
    add("--val", type=filename, help=f"folder of held-out images, of which {HELD_OUT} are measured (default: 1 "
        f"in 20 of --data, {HELD_OUT} at most, evenly spaced)")
    add("--out", type=filename, help="folder for checkpoint, log and pictures (default: runs/quickstart, with "
        "--data runs/litevae; for sample_ldm.py runs/ldm)")
    add("--resume", action=SWITCH, help="go on from the checkpoint in --out, with the options it was started with")
    add("--steps", type=positive_int, help="updates of the model")
    add("--batch-size", type=positive_int, help="images a step, over all processes")
    add("--resolution", type=multiple_of_8, help="side of the square crops in pixels, a multiple of 8")
    add("--seed", type=seed, help="seed of weights, images and noise")
    add("--save-every", type=positive_int, help="steps between checkpoints, pictures and held-out measurements")
    add("--log-every", type=positive_int, help="steps between rows of log.csv")
    add("--workers", type=natural, help="processes that load images (default: one a core, 8 at most; on a CPU none)")
    add("--device", help="cuda, cuda:1, mps, cpu (default: the best there is)")
    add("--precision", choices=["auto", "fp32", "bf16"], help="of the networks; auto is bf16 where it is fast")
    add("--compile", action=SWITCH, help="torch.compile the model: a slow start, then faster steps")
    add = group("optimisation")
    add("--lr", type=positive, help="Adam's learning rate")
    add("--beta1", type=fraction, help="Adam's first beta")
    add("--beta2", type=fraction, help="Adam's second beta")
    add("--lr-warmup", type=natural, help="steps over which the learning rate first rises linearly")
    add("--lr-decay", type=fraction, help="share of the steps, at the end, over which the rate falls linearly to 0")
    add("--clip", type=positive, help="gradients with a larger norm are scaled down to this one")
    add("--ema", type=fraction, help="decay of the EMA weights; after n steps (1+n)/(10+n), if that is less")


def option_group(parser, title, quick, data):
    """argparse's add_argument for a group of options, whose help then states the default in both recipes.

    An option that is not typed is not in the namespace: its value comes from a recipe, or with --resume from the run.
    """
    group = parser.add_argument_group(title)

    def add(name, help, **how):
        key = name[2:].replace("-", "_")
        if quick.get(key) is not None:
            differs = data[key] != quick[key]
            help += f" (default: {quick[key]}" + (f", with --data {data[key]})" if differs else ")")
        group.add_argument(name, help=help, default=argparse.SUPPRESS, **how)
    return add


SWITCH = argparse.BooleanOptionalAction


def checked(kind, fits, words):
    """An argparse type: kind(text); an error with `words` unless fits(value)."""
    def parse(text):
        value = kind(text)
        if not fits(value):
            raise argparse.ArgumentTypeError(f"must be {words}, got {text}")
        return value
    parse.__name__ = kind.__name__  # argparse's own refusal names it: "invalid int value"
    return parse


filename = checked(str, bool, "the name of a file or folder")  # no unset variable of a shell
positive_int = checked(int, lambda v: 0 < v < 2**31, "a whole number above 0")
natural = checked(int, lambda v: 0 <= v < 2**31, "a whole number, 0 or above")
multiple_of_8 = checked(int, lambda v: 0 < v <= 4096 and v % 8 == 0, "a multiple of 8, at most 4096")
seed = checked(int, lambda v: 0 <= v < 2**32 - 1, f"a whole number from 0 to {2**32 - 2}")
positive = checked(float, lambda v: 0 < v < math.inf, "a number above 0")
non_negative = checked(float, lambda v: 0 <= v < math.inf, "a number, 0 or above")
number = checked(float, math.isfinite, "a finite number")
fraction = checked(float, lambda v: 0 <= v < 1, "a number from 0 to below 1")


# --- 3  The loop --------------------------------------------------------------------------------------

MAX_BAD_STEPS = 20  # not finite, in a row
ADVICE = "go on from the last checkpoint with --resume, or start again, with a lower --lr or --precision fp32"


def prepare(args, machine, checkpoint):
    """The task, its data set and the step to start from."""
    torch.manual_seed(args.seed)
    dataset, held_out = open_images(args, DeadLeaves)
    try:
        vae = LiteVAE.from_checkpoint(checkpoint) if checkpoint else build_autoencoder(config_of(args))
        discriminator = DISCRIMINATORS[args.discriminator](args)
    except ValueError as error:  # a checkpoint, a resolution or a latent that does not fit
        raise UsageError(str(error))
    check_resolution(vae, args.resolution)
    perceptual = None
    if args.perceptual != "none" and args.weight_perceptual:
        try:
            perceptual = PERCEPTUAL[args.perceptual]()
        except OSError as error:
            raise UsageError(f"{error}; or go without it: --perceptual none")

    # Fine-tuning goes on with the discriminator of the first stage, if it has the same shape.
    shapes = lambda weights: {name: tensor.shape for name, tensor in weights.items()}  # noqa: E731
    trained = (checkpoint or {}).get("training", {}).get("discriminator", {})
    goes_on = discriminator and shapes(trained) == shapes(discriminator.state_dict())
    if goes_on:
        discriminator.load_state_dict(trained)
    # Unspecified: when the adversarial loss starts. Figure 7's axis begins at 40,000 of 200,000 steps; LDM and
    # diffusers start at 50,001: a quarter. A trained discriminator starts at once.
    if args.disc_start is None:
        args.disc_start = 0 if goes_on else args.steps // 4
    if args.disc_warmup is None:
        args.disc_warmup = args.disc_start // 10

    kind = AblationTask if args.weight_ldl or args.adaptive_weight or args.grad_ratio else AutoencoderTask
    task = kind(args, machine, vae, held_out, perceptual, discriminator)
    return task, dataset, task.resume(checkpoint) if args.resume else 0


def check_resolution(vae, resolution):
    """UsageError if the autoencoder has a ViT aggregator, which takes images of one resolution alone (Table 20)."""
    if vae.config.get("resolution") not in (None, resolution):
        raise UsageError(f"the autoencoder has a ViT aggregator: it needs --resolution {vae.config.resolution}")


def fit(task, dataset, start):
    """The training loop. Returns the exit status: 0, or 128 + the signal's number after a stop signal.

    task.step(batch, step, log)  one update; returns scalars (all of them if `log`), and whether it was finite
    task.report(step)            pictures and held-out numbers (rank 0 only); returns scalars
    task.save(step)              writes the checkpoint (rank 0 only)
    task.shown, task.skipped     the scalars on the progress bar; how many steps were not finite
    task.args, task.machine      options and device; task.title, .vae, .ema and .held_out are read by `announce`
    """
    args, machine, main = task.args, task.machine, task.machine.rank == 0
    stream = batches(dataset, args.batch_size, start, machine, args.workers)
    if main:
        announce(task, dataset, start)
        log = Log(args, start)
    done, bad, good, stopped, received = start, 0, True, False, stop_signals()
    bar = progress_bar(args.steps, start, disable=not main)
    try:
        while done < args.steps and not stopped:
            batch = next(stream)
            torch.manual_seed(args.seed * 1_000_003 + done)  # a resumed run draws the same noise
            due = (done + 1) % args.save_every == 0 or done + 1 == args.steps
            logged = due or (done + 1) % args.log_every == 0 or done == 0
            values, finite = task.step(batch, done, logged)
            done += 1
            bar.update()

            # A step that is not finite changes no weights. Several in a row: the weights are bad, and are not saved.
            task.skipped += not finite
            bad = 0 if finite else bad + 1
            good = bad < 2
            stopped = machine.any(bool(received))
            if bad == MAX_BAD_STEPS or (not good and (due or stopped)):
                raise UsageError(f"the gradients of {bad} steps up to step {done} are not finite: {ADVICE}")

            if logged:
                values = {**machine.mean(values), "skipped": task.skipped}
            if main and stopped:
                task.save(done)  # before the report, for a second signal ends the process
            if main and (due or stopped):
                report = task.report(done)
                good = all(map(math.isfinite, report.values()))
                if not good:
                    raise UsageError(f"the EMA weights of step {done} are not finite: {ADVICE}")
                task.save(done)
                values |= report
                bar.write(f"step {done}: " + ", ".join(f"{name} {value:.4g}" for name, value in report.items()))
            if main and logged:
                bar.set_postfix_str(", ".join(f"{name} {values[name]:.4g}" for name in task.shown))
                log.write(done, values)
    except Exception:  # a killed loader, a folder that is gone, no memory left: nothing good is lost
        if main and good and done > start:
            task.save(done)
            bar.write(f"saved after step {done}")
        raise
    finally:
        bar.close()
    machine.wait()  # torchrun ends all processes with the first that fails
    if done == args.steps:
        return 0
    if main:
        print(f"stopped after step {done} of {args.steps}: go on with --resume --out {args.out}")
    return 128 + (received[0] if received else signal.SIGTERM)


# --- 4  The step (Eq. 1, Sec. 4.3) --------------------------------------------------------------------


class AutoencoderTask:
    """An autoencoder, its discriminator, and one update of each: what `fit` runs."""

    shown = ["loss", "l1"]

    def __init__(self, args, machine, vae, held_out, perceptual=None, discriminator=None):
        self.args, self.machine, self.held_out, self.skipped = args, machine, held_out, 0
        betas = (args.beta1, args.beta2)
        self.title = vae.name
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
        """One update of the autoencoder, one of the discriminator. Returns what is logged, and if all was finite."""
        args = self.args
        image = self.machine.images(batch[0])  # (B, 3, H, W) in [-1, 1]
        lr = learning_rate(step, args)

        # Encode, sample, decode.
        B, _, H, W = image.shape
        noise = self.machine.randn((B, self.vae.config.latent_dim, H // 8, W // 8))  # (B, nz, h, w)
        output = self.reconstruct(image, noise)

        # Eq. 1 and its gradients. The adversarial weight ramps up from 0 over disc_warmup steps.
        fake_logits = self.judge(output.sample) if self.discriminator and step >= args.disc_start else None
        ramp = min(1.0, (step + 1 - args.disc_start) / max(1, args.disc_warmup))
        loss, terms = self.loss(image, output, fake_logits, ramp)
        norms = [backward(loss, self.vae, self.optimizer, args.clip)]
        values = {"loss": loss, "grad_norm": norms[0], "lr": lr, **terms}

        # The discriminator, on the same reconstructions. It starts to train disc_warmup steps before disc_start.
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
        if log:
            d = output.latent_dist
            values |= {"kl_nats": output.kl_reg, "latent_std": d.mean.std(), "latent_max": d.mean.abs().max(),
                       "posterior_std": d.std.mean()}
        return values, all(finite)

    def reconstruct(self, image, noise):
        """The autoencoder's output. Weights stay in float32, the networks run in bf16 where that is fast."""
        with self.machine.autocast():
            return self.vae_parallel(image, noise=noise)

    def judge(self, image):
        """The discriminator's logits, with gradients for the image only."""
        self.discriminator.requires_grad_(False)
        with self.machine.autocast():
            logits = self.discriminator(image)
        self.discriminator.requires_grad_(True)
        return logits

    def loss(self, image, output, fake_logits, ramp):
        """Eq. 1: the loss, (), and a dict of its terms. `ramp`, 0 to 1, scales the adversarial weight."""
        weights = {**self.weights, "adv": ramp * self.weights["adv"]}
        loss, terms = autoencoder_loss(output, image, weights, self.perceptual, fake_logits, self.g_loss)
        if fake_logits is not None:
            terms["adv_weight"] = weights["adv"]
        return loss, terms

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
        self.vae.config.scaling_factor = round(1 / max(torch.cat(latents).std().item(), 1e-6), 5)
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


# --- 5  What options choose (Tables 2, 10 and 15 to 21, Figure 7) -------------------------------------


def config_of(args):
    """The autoencoder's config: what build_autoencoder reads and a checkpoint keeps."""
    config = {key: getattr(args, key) for key in ("model", *DECODER, *ENCODER)}
    if args.model != "litevae":
        return {key: config[key] for key in ("model", *DECODER)}
    if all(config[key] == COMMON[key] for key in VARIANT):
        return {key: config[key] for key in (*DECODER, "size", "use_1x1_conv")}
    return {**config, "model": "litevae-variant", "resolution": args.resolution if args.aggregator == "vit" else None}


class AblationTask(AutoencoderTask):
    """The step with what Eq. 1 does without: LDL, the adaptive weight of Eq. 2, the gradient ratio of Fig. 7."""

    def __init__(self, args, *parts):
        if args.compile:  # gradients at the last layer are taken before backward: compiled code must keep its buffers
            import torch._functorch.config as functorch
            functorch.donated_buffer = False
        super().__init__(args, *parts)
        self.last_layer = self.vae.decoder.conv_out.weight

    def step(self, batch, step, log):
        self.measure_ratio = log and self.args.grad_ratio
        return super().step(batch, step, log)

    def reconstruct(self, image, noise):
        if self.args.weight_ldl:
            with torch.no_grad(), self.machine.autocast():
                self.x_ema = self.ema.model(image, noise=noise).sample
        return super().reconstruct(image, noise)

    def loss(self, image, output, fake_logits, ramp):
        args, average = self.args, self.machine.average
        adversarial = fake_logits is not None
        adaptive = args.adaptive_weight and adversarial
        # With Eq. 2 the adversarial term is added below, once there are gradients to weigh it by.
        loss, terms = super().loss(image, output, fake_logits, 0.0 if adaptive else ramp)
        if args.weight_ldl:
            terms["ldl"] = ldl_loss(output.sample, image, self.x_ema)
            terms["recon"] = terms["recon"] + args.weight_ldl * terms["ldl"]
            loss = loss + args.weight_ldl * terms["ldl"]
        if adaptive:
            terms["adv_weight"] = ramp * adaptive_weight(terms["recon"], terms["adv"], self.last_layer, average=average)
            loss = loss + terms["adv_weight"] * terms["adv"]
        if adversarial and self.measure_ratio:
            # Paper: Fig. 7 can only be about the unweighted L_adv, for with the adaptive weight of Eq. 2 the weighted
            # ratio would be 1/2 by construction.
            g_adv, g_recon = gradient_norms((terms["adv"], terms["recon"]), self.last_layer, average)
            terms["grad_ratio"] = g_adv / g_recon.clamp_min(1e-12)
        return loss, terms


# --- 6  Images ----------------------------------------------------------------------------------------
# A data set is endless: dataset[position] is (image, label), a (3, H, W) uint8 tensor and the number of its class, 0
# without classes. Both depend on the seed and the position alone. So a resumed run sees the images that it would have
# seen, and processes need not tell one another what they have taken.


def open_images(args, built_in, label=None):
    """The images to train on, and a list of those held out. UsageError if there is nothing to read.

    Without --data they come from `built_in`, DeadLeaves or Shapes. label(file, root) is the number of a file's class.
    """
    def images(files, root, **how):
        return ImageFolder(files, args.resolution, labels=label and [label(file, root) for file in files], **how)

    files = find_images(args.data) if args.data else []
    candidates, root = (find_images(args.val), args.val) if args.val else (files, args.data)
    if candidates:
        # Evenly spaced, so that no class of a sorted folder is alone.
        count = HELD_OUT if args.val else min(HELD_OUT, -(-len(files) // 20))
        whole = images(candidates, root, augment=False)
        found = dict(whole.first_readable(i * len(candidates) // count) for i in range(count))
        held_out = list(found.values())
    else:
        unseen = built_in(args.resolution, 2**32 - 1)  # a seed no run trains on
        held_out = [unseen[i] for i in range(HELD_OUT)]
    if not args.data:
        return built_in(args.resolution, args.seed), held_out
    # A --val folder inside --data is left out as a whole. Where no image is left, all are trained on.
    left_out = {os.path.realpath(file) for file in (candidates if args.val else found)}
    others = [file for file in files if os.path.realpath(file) not in left_out]
    return images(others or files, args.data, seed=args.seed), held_out


IMAGE_SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm",
                  ".pnm", ".jp2", ".avif", ".tga"}


def find_images(folder):
    """Every image below `folder`, sorted, suffixes in any case. UsageError if there is none."""
    files, entered = [], set()
    for root, folders, names in os.walk(folder, followlinks=True):
        folders.sort()
        if os.path.realpath(root) in entered:  # a link leads to it a second time
            folders.clear()
            continue
        entered.add(os.path.realpath(root))
        files += [os.path.join(root, name) for name in names if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES]
    if not files:
        raise UsageError(f"there are no images in {folder} ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return sorted(files)


class ImageFolder:
    """Image files as a stream: shuffled anew each epoch, cropped and flipped at random if `augment`.

    position -> ((3, resolution, resolution) uint8, label); `labels` holds a number for each file. If a file cannot be
    read, its name is printed and the next file takes its place. UsageError if none can be read.
    """

    def __init__(self, files, resolution, seed=0, augment=True, labels=None):
        self.files, self.resolution, self.seed, self.augment = files, resolution, seed, augment
        self.labels = labels or [0] * len(files)
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
            i = (index + attempt) % len(self.files)
            rng = np.random.default_rng((self.seed, 1, position)) if self.augment else None
            try:
                image = as_tensor(load_image(self.files[i], self.resolution, rng))
                return self.files[i], (image, self.labels[i])
            except OSError as error:
                tqdm.write(f"skipped, cannot be read: {self.files[i]} ({one_line(error)})")
        raise UsageError(f"none of the {len(self.files)} images can be read, {self.files[0]} for one")


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

    The image is first reduced, or enlarged if it is smaller. OSError as from open_rgb.
    """
    # Unspecified: augmentation. As in ADM's code: the crop takes 80 to 100 % of the shorter side.
    short = int(resolution if rng is None else rng.integers(resolution, int(resolution / 0.8) + 1))
    image = open_rgb(path, short)
    if max(image.size) > 32 * min(image.size):  # enlarged whole, it could fill the memory
        raise OSError("more than 32 times as long as it is wide")
    scale = short / min(image.size)
    width, height = [max(resolution, round(side * scale)) for side in image.size]
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    x, y = (width - resolution) // 2, (height - resolution) // 2
    if rng is not None:
        x, y = rng.integers(width - resolution + 1), rng.integers(height - resolution + 1)
    pixels = np.asarray(image.crop((x, y, x + resolution, y + resolution)))
    return pixels[:, ::-1] if rng is not None and rng.random() < 0.5 else pixels


def open_rgb(path, short=None):
    """The file as a PIL image in RGB. A JPEG may come smaller, if its shorter side stays at least `short`.

    Grey, palette, alpha (on white), 16-bit and EXIF-rotated files come out as RGB the right way up. OSError for a file
    that cannot be read or is no image.
    """
    try:
        image = Image.open(path)
        if short:
            image.draft("RGB", (short, short))  # JPEG: decode at 1/2, 1/4 or 1/8 if that is still enough
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16-bit grey, which PIL would clip
            image = Image.fromarray((np.asarray(image).astype(np.float32) / 257).clip(0, 255).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except Exception as error:  # PIL raises a dozen kinds for a dozen kinds of damage
        raise OSError(one_line(error)) from None


def as_tensor(pixels):
    """(H, W, 3) uint8 -> (3, H, W) uint8 tensor."""
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


# --- 7  PSNR and grids --------------------------------------------------------------------------------


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


# --- 8  The machine -----------------------------------------------------------------------------------


def batches(dataset, batch_size, start, machine, workers):
    """This process's share of batches `start`, `start + 1`, ... of an endless stream of images."""
    share, rest = divmod(batch_size, machine.world)
    if rest:
        raise UsageError(f"--batch-size {batch_size} cannot be shared by {machine.world} processes: make it a multiple")
    workers = machine.workers(workers)
    mine = range(machine.rank * share, (machine.rank + 1) * share)
    positions = ([first + i for i in mine] for first in itertools.count(start * batch_size, batch_size))
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
            torch.zeros(1, device=self.device).item()
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


# --- 9  Around the loop -------------------------------------------------------------------------------

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


def ignore_signals(worker):
    # Signals reach every process of a terminal or a job; the main one decides when to stop.
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def stop_signals():
    """A list that receives Ctrl-C, SIGTERM and SIGHUP, so that a run can save first. A second one ends the process."""
    received = []

    def note(number, frame):
        received.append(number)
        signal.signal(number, signal.SIG_DFL)

    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, note)
    return received


class UsageError(Exception):
    """Invalid input, printed without a traceback."""


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UsageError(f"{message} (--help lists every option)")


def flag(key):
    return "--" + key.replace("_", "-")


def load_optimizer(optimizer, state):
    """Take up the moments of a checkpoint; learning rate and the like come from the options."""
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


class EMA:
    """Exponential moving average of a model's weights, in a copy of the model: `.model`."""

    def __init__(self, model, decay):
        self.model, self.decay, self.updates = copy.deepcopy(model).eval().requires_grad_(False), decay, 0

    @torch.no_grad()
    def update(self, model):
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))  # shorter at first
        torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), 1 - decay)
        self.updates += 1


def announce(task, dataset, start):
    """Print the run in one line."""
    args, machine, side = task.args, task.machine, task.args.resolution // 8
    millions = sum(p.numel() for p in task.ema.model.parameters()) / 1e6
    images = f"{len(dataset)} images of {args.data}" if args.data else "built-in images"
    print(f"{task.title}, {millions:.2f} M parameters, latent {side}x{side}x{task.vae.config.latent_dim}; {images}, "
          f"{len(task.held_out)} held out, at {args.resolution}x{args.resolution}; {machine.device}, "
          f"{'bf16' if machine.bf16 else 'fp32'}; steps {start} to {args.steps}; all goes to {args.out}", flush=True)


def progress_bar(total, start=0, **how):
    """A tqdm bar. Where there is no terminal it is printed once in ten seconds."""
    return tqdm(total=total, initial=start, mininterval=0.5 if sys.stderr.isatty() else 10, dynamic_ncols=True, **how)


class Log:
    """log.csv, a row for each logged step. Makes the folder --out."""

    def __init__(self, args, start):
        self.path, self.rows = Path(args.out, "log.csv"), []
        self.batch_size, self.step, self.since = args.batch_size, start, time.monotonic()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if start and self.path.exists():
            try:
                with open(self.path, newline="") as file:
                    rows = csv.DictReader(file)
                    rows = [{name: float(value) for name, value in row.items() if value} for row in rows]
                self.rows = [row for row in rows if row["step"] <= start]  # without those after the checkpoint
            except (KeyError, TypeError, ValueError):
                raise UsageError(f"{self.path} is no log of this run any more: move it away")

    def write(self, step, values):
        now = time.monotonic()
        speed = (step - self.step) * self.batch_size / (now - self.since)
        self.step, self.since = step, now
        self.rows.append({"step": step, **values, "images_per_second": speed})
        columns = list(dict.fromkeys(name for row in self.rows for name in row))
        partial = self.path.with_suffix(".csv.partial")
        with open(partial, "w", newline="") as file:  # whole, for a row may bring a new column
            writer = csv.writer(file)
            writer.writerow(columns)
            writer.writerows([f"{row[name]:.7g}" if name in row else "" for name in columns] for row in self.rows)
        os.replace(partial, self.path)


def run_script(main, argv=None):
    """The exit status of main(argv): 1 after invalid input, which is printed as one sentence, 130 after Ctrl-C."""
    name = Path(sys.modules[main.__module__].__file__).name
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # file names that a terminal cannot print
    try:
        return main(argv)
    except (UsageError, CheckpointError, OSError, MemoryError, RuntimeError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        # The words of an error in a loader's process stand in the last line, behind its class.
        text = lines[-1].partition(": ")[2] if lines[0].startswith("Caught ") else lines[0]
        signs = ("out of memory", "not enough memory", "allocate memory", "DataLoader worker")  # the last was killed
        full = isinstance(error, MemoryError) or any(sign in text for sign in signs)
        if isinstance(error, RuntimeError) and not full:
            raise
        if int(os.environ.get("RANK", 0)) == 0:
            advice = ": lower --batch-size, --resolution or --workers" if full else ""
            print(f"{name}: {text}{advice}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # before or after the loop, which has its own way to stop
        print(f"{name}: stopped", file=sys.stderr)
        return 130
    finally:
        # Loaders ignore SIGTERM, by which Python ends them: after an error it would wait for them without end.
        loaders = multiprocessing.active_children()
        if loaders and hasattr(signal, "SIGCHLD"):  # not on Windows
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises when one dies
        for loader in loaders:
            loader.kill()
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
    sys.exit(run_script(main))
