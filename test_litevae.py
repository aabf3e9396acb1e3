"""Tests of LiteVAE, in the order of the files: litevae.py section by section, train.py, sample_ldm.py, eval.py.

    pip install -r requirements.txt pytest PyWavelets scikit-image diffusers spandrel pytorch-fid pytest-xdist
    python -m pytest -n 2
    python -m pytest -m slow -s        the samples of the diffusion quick start, named by a classifier: minutes

No network; a GPU only for the tests named cuda, which are skipped without one. What a test compares with is an oracle
(PyWavelets, diffusers, spandrel, lpips, pytorch-fid, scikit-image, scipy, torchvision, torch.distributions), the
paper's equation written out as a loop, or a value worked out by hand.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # where cores are scarce, threads that spin slow others down

import argparse
import ast
import contextlib
import copy
import csv
import functools
import inspect
import io
import itertools
import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
import zipfile
from pathlib import Path
from unittest import mock

import diffusers
import lpips
import numpy as np
import pytest
import pytorch_fid.inception
import pywt
import safetensors.torch
import scipy.linalg
import scipy.ndimage
import scipy.signal
import skimage.metrics
import skimage.transform
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from PIL import Image
from spandrel.architectures.NAFNet.__arch import NAFNet_arch

import eval as evaluation  # the name of a built-in function
import litevae
import sample_ldm
import train
from litevae import (LPIPS, PRESETS, SDVAE, SMC, DiagonalGaussianDistribution, HaarTransform, LiteVAE, LiteVAEUNetBlock,
                     SDVAEDecoder, UNetDiscriminator, autoencoder_loss, discriminator_loss, load_checkpoint,
                     save_checkpoint)

HERE = Path(__file__).parent
torch.set_num_threads(1)  # nothing here is large enough to gain from more


@pytest.fixture(autouse=True)
def seeded(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(train, "HELD_OUT", 8)  # runs of a few steps need not be measured on more


small_vae = functools.partial(LiteVAE, size="S", latent_dim=4, decoder_channels=8)
small_variant = functools.partial(small_vae, model="litevae-variant")
VARIANTS = {
    "litevae": small_vae, "sd-vae": lambda: SDVAE("sd-vae", decoder_channels=8),
    "vae-small": lambda: SDVAE("vae-small", decoder_channels=8),
    "dwt": lambda: litevae.DWTVAE("dwt", decoder_channels=8),
    "dwt-2": lambda: litevae.DWTVAE("dwt-2", decoder_channels=8),
    "nafnet": lambda: small_variant(extractor="nafnet"), "shared": lambda: small_variant(shared_extractor=True),
    "vit": lambda: small_variant(aggregator="vit", resolution=16),
    "two levels": lambda: small_variant(last_two_levels=True),
    "all at once": lambda: small_variant(extractor="nafnet", shared_extractor=True, aggregator="vit", resolution=16,
                                         last_two_levels=True, use_1x1_conv=True, use_smc=True, output_type="wavelet")}


def randomise(module, scale=0.2):
    """Shift every parameter, so that gains, scales and biases are not at their neutral start."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(scale * torch.randn_like(p))
    return module


def image_batch(*shape, dtype=torch.float32):
    return torch.rand(*shape, dtype=dtype) * 2 - 1


close = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5)  # tensors, or lists or dicts of them
assert_same_weights = functools.partial(torch.testing.assert_close, rtol=0, atol=0)  # two state dicts


def count(module):
    return sum(p.numel() for p in module.parameters())


# The scripts, run in this process with tiny options.

EVERYWHERE = ["--device", "cpu", "--precision", "fp32", "--workers", "0", "--resolution", "16", "--lr-decay", "0",
              "--log-every", "1", "--save-every", "1000"]
TINY = {train: [*EVERYWHERE, "--decoder-channels", "8", "--batch-size", "2"],
        sample_ldm: ["train", *EVERYWHERE, "--no-class-cond", "--no-cache-latents", "--batch-size", "4"]}
GAN = ["--discriminator", "unet", "--disc-channels", "8", "--disc-start", "4", "--disc-warmup", "2"]
DISC = ["--disc-channels", "8", "--disc-start", "1", "--disc-warmup", "1"]
NO_METRICS = ["--no-fid", "--lpips-net", "none"]


def run(script, *args):
    """A script's main(); its exit status."""
    return train.run_script(script.main, [str(a) for a in args])


def trained(out, *options, script=train):
    """A tiny run of train.py, or of sample_ldm.py, into the folder `out`: the rows of its log and its checkpoint."""
    assert run(script, *TINY[script], *options, "--out", out) == 0
    return rows(out), checkpoint_of(out)


def resumed(out, *options, script=train):
    assert run(script, *(["train"] if script is sample_ldm else []), "--resume", *options, "--out", out) == 0
    return rows(out), checkpoint_of(out)


def measured(folder, *args, device="cpu"):
    """The numbers that a command of eval.py writes."""
    assert run(evaluation, *args, "--device", device, "--json", folder / "r.json") == 0
    return json.loads((folder / "r.json").read_text())


def rows(out, name="log.csv"):
    return list(csv.DictReader((Path(out) / name).read_text().splitlines()))


def checkpoint_of(out):
    return torch.load(Path(out) / "checkpoint.pt", weights_only=True)


def same(a, b):
    """Whether two checkpoints agree to the bit, optimisers and EMA weights included; options aside."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a if k != "args")
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def held_out_images(count=8, resolution=16):
    """The first of the built-in images that no run trains on: (count, 3, R, R) in [-1, 1]."""
    unseen = train.DeadLeaves(resolution, 2**32 - 1)
    return torch.stack([unseen[i][0] for i in range(count)]) / 127.5 - 1


def load_square(file, resolution):
    """The centre square of an image file: (3, R, R) uint8."""
    return torch.from_numpy(train.load_image(file, resolution).copy()).permute(2, 0, 1)


# --- Fixtures -----------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def vgg_file(tmp_path_factory):
    """A torch hub folder with random files of the published trunks' layout, without their classifiers."""
    hub = tmp_path_factory.mktemp("hub")
    (hub / "checkpoints").mkdir()
    torch.manual_seed(1)
    for net, file in {"vgg16": "vgg16-397923af.pth", "vgg19": "vgg19-dcbb9e9d.pth",
                      "alexnet": "alexnet-owt-7be5be79.pth", "squeezenet1_1": "squeezenet1_1-b8a52dc0.pth"}.items():
        with torch.device("meta"):
            trunk = getattr(torchvision.models, net)().features.to_empty(device="cpu")
        for p in trunk.parameters():
            nn.init.kaiming_normal_(p) if p.ndim > 1 else nn.init.normal_(p, std=0.1)
        # The published VGG-16 predates torch's zip format.
        torch.save(trunk.state_dict(prefix="features."), hub / "checkpoints" / file,
                   _use_new_zipfile_serialization=net != "vgg16")
    return hub


@pytest.fixture
def vgg(vgg_file, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(vgg_file))
    return vgg_file


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """No network; the folder in which no file of weights is yet."""
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(folder.parent))
    monkeypatch.setattr(torch.hub, "download_url_to_file", mock.Mock(side_effect=OSError("no network in tests")))
    return folder


@pytest.fixture
def narrow(monkeypatch):
    """Part II's encoders with few channels."""
    for model, ch_mult in {"sd-vae": (1, 2, 4, 4), "vae-small": (2, 3, 3, 4)}.items():
        monkeypatch.setitem(litevae.ENCODERS, model, lambda latent_dim, ch_mult=ch_mult: litevae.SDVAEEncoder(
            latent_dim, 8, ch_mult))
    monkeypatch.setitem(litevae.NAFNETS, "S", (8, 2))


@pytest.fixture
def folder(tmp_path):
    """Images as they are found in the wild: nested, odd modes and sizes, upper-case suffixes, broken ones."""
    root = tmp_path / "images"
    (root / "deep" / "er").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, w, h, mode in (("a.JPG", 64, 48, "RGB"), ("deep/b.jpeg", 300, 200, "RGB"), ("deep/grey.png", 40, 40, "L"),
                             ("deep/er/palette.gif", 50, 40, "P"), ("tiny.png", 7, 5, "RGB"),
                             ("deep/er/odd.webp", 33, 70, "RGB")):
        noise = rng.integers(0, 256, (h // 8 + 1, w // 8 + 1, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((w, h)).convert(mode).save(root / name)
    (root / "broken.jpg").write_bytes((root / "a.JPG").read_bytes()[:300])
    (root / "empty.png").write_bytes(b"")
    (root / "notes.txt").write_text("not an image")
    return root


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    """The folder of a run that has done its six steps."""
    out = tmp_path_factory.mktemp("finished") / "done"
    trained(out, *GAN, "--weight-gaussian", 0.5, "--steps", 6, "--save-every", 3)
    return out


@pytest.fixture(scope="session")
def wrong_files(tmp_path_factory):
    """Files and folders that no command can use."""
    tmp = tmp_path_factory.mktemp("wrong")
    for name, n in (("empty", 0), ("one", 1), ("two", 2)):
        (tmp / name).mkdir()
        for i in range(n):
            Image.new("RGB", (20 + i, 30), (i, 9, 9)).save(tmp / name / f"{i}.png")
    vit, vae = small_variant(aggregator="vit", resolution=16), small_vae()
    nn.init.constant_(vae.decoder.conv_out.bias, math.nan)
    for name, module in (("vit", vit), ("nan", vae)):
        save_checkpoint(tmp / f"{name}.pt", module, args={"resolution": 16})
    return tmp


@pytest.fixture
def tiny_ldm(monkeypatch, vae_file):
    """Small networks, few images to encode, and the autoencoder that encodes them."""
    monkeypatch.setitem(TINY, sample_ldm, [*TINY[sample_ldm], "--vae", vae_file])
    tiny = {"channels": 32, "ch_mult": (1, 2), "num_res_blocks": 1, "attention": (1,)}
    for name in ("quick", "small"):
        monkeypatch.setitem(sample_ldm.PRESETS, name, tiny)
    monkeypatch.setattr(sample_ldm, "BUILT_IN_CACHE", 6)


@pytest.fixture(scope="session")
def class_folder(tmp_path_factory):
    """Images in two sub-folders: red ones and blue ones."""
    root = tmp_path_factory.mktemp("classes")
    for name, colour in (("red", (250, 20, 20)), ("blue", (10, 20, 240))):
        (root / name / "deep").mkdir(parents=True)
        for i in range(6):
            Image.new("RGB", (20 + i, 24), colour).save(root / name / ("deep" if i % 2 else "") / f"{i}.png")
    return root


@pytest.fixture(scope="session")
def ldm_file(tmp_path_factory, vae_file):
    """A checkpoint of random weights, with two classes."""
    torch.manual_seed(5)
    path, vae = tmp_path_factory.mktemp("ldm") / "checkpoint.pt", LiteVAE.from_checkpoint(vae_file)
    unet = lambda: randomise(sample_ldm.UNet(4, 32, (1, 2), 1, (1,), classes=2), 0.1)  # noqa: E731
    raw, ema = sample_ldm.Denoiser(unet()), sample_ldm.Denoiser(unet())
    sample_ldm.save_ldm(path, raw, ema, vae, ["cat", "dog"], 32)
    return path


@pytest.fixture(scope="session")
def inception_file(tmp_path_factory):
    """A random file of the published Inception's layout, written by pytorch-fid's own network."""
    torch.manual_seed(2)
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pytorch_fid.inception, "load_state_dict_from_url", lambda *args, **kwargs: None)
        patch.setattr(nn.Module, "load_state_dict", lambda *args, **kwargs: None)
        net = pytorch_fid.inception.fid_inception_v3()
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
        if isinstance(module, nn.BatchNorm2d):
            for p, scale, shift in ((module.weight, 0.1, 1), (module.bias, 0.1, 0), (module.running_mean, 0.3, 0)):
                p.data.normal_(shift, scale)
            module.running_var.uniform_(0.5, 1.5)
    path = tmp_path_factory.mktemp("inception") / evaluation.INCEPTION_FILE
    torch.save(net.state_dict(), path)
    return path


@pytest.fixture(scope="session")
def inception(inception_file):
    return evaluation.load_inception(inception_file)


@pytest.fixture(scope="session")
def vae_file(tmp_path_factory):
    """A checkpoint of random weights whose EMA weights differ."""
    torch.manual_seed(4)
    path = tmp_path_factory.mktemp("vae") / "checkpoint.pt"
    vae, ema = randomise(small_vae(), 0.02), randomise(small_vae(), 0.02)
    for v in (vae, ema):
        v.config.scaling_factor = 0.5
    save_checkpoint(path, vae, ema, args={"resolution": 32})
    return path


@pytest.fixture
def gpu(monkeypatch):
    """A fake GPU under bf16 autocast: `with gpu:` watches what is computed on it."""
    if not torch.backends.cuda.is_built() or not hasattr(torch._C, "_ensureCUDADeviceGuardSet"):
        pytest.skip("this build of torch does not know CUDA's rules")
    torch._C._ensureCUDADeviceGuardSet()
    attention = F.scaled_dot_product_attention

    def attend(*qkv):
        assert {t.stride(-1) for t in qkv} == {1}, "CUDA would take a slow kernel"
        return attention(*qkv)
    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True), torch.set_autocast_dtype("cuda", torch.bfloat16)
    with torch._subclasses.FakeTensorMode(), torch.no_grad():
        yield FakeGPU()
    torch.set_autocast_enabled("cuda", before[0]), torch.set_autocast_dtype("cuda", before[1])


@pytest.fixture
def exact(monkeypatch):
    """A GPU computes float32 as float32."""
    torch.set_float32_matmul_precision("highest")
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda precision: None)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


# --- 1  Haar wavelet transform ------------------------------------------------------------------------


def test_haar_equals_pywavelets_and_its_inverse_is_exact():
    haar, x = HaarTransform(), torch.randn(2, 3, 32, 48, dtype=torch.float64)

    for level, bands in enumerate(haar.cascade(x), 1):
        low, (h, v, d), *_ = pywt.wavedec2(x.numpy(), "haar", level=level)
        close(bands, torch.from_numpy(np.concatenate([low, h, v, d], axis=1)), rtol=0, atol=1e-12)
        assert torch.equal(haar.dwt(x, level), bands)
    close(haar(haar(x), inverse=True), x, rtol=0, atol=1e-14)
    assert haar.dwt(bands.half()).dtype == haar.idwt(bands.half()).dtype == torch.float32


# --- 2  Building blocks -------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [{"stride": 2}, {"padding": 0}, {"bias": False, "kernel_size": 5}])
def test_smc_equals_equation_3_as_a_loop(how):
    smc, x = randomise(SMC(3, 4, **how), 0.5).double(), torch.randn(2, 3, 7, 9, dtype=torch.float64)
    smc.weight.data *= 1e-4  # so small that eps counts

    w = torch.stack([s * w_i for s, w_i in zip(smc.scales, smc.weight.unbind(1))], dim=1)  # input maps
    w = torch.stack([w_j / (w_j.square().sum() + 1e-8).sqrt() for w_j in w])  # output maps
    expected = F.conv2d(x, smc.gain * w, smc.bias, how.get("stride", 1), how.get("padding", smc.kernel_size[0] // 2))

    close(smc(x), expected, rtol=0, atol=1e-12)


def residual(block, x):
    """A residual block written out, with GroupNorm or with SMC."""
    norm_in, norm_out = [getattr(block, name, nn.Identity()) for name in ("norm_in", "norm_out")]
    h = block.conv_in(F.silu(norm_in(x)))
    return block.conv_out(F.silu(norm_out(h))) + block.skip_connection(x)


@pytest.mark.parametrize("use_smc", [False, True])
def test_unet_equals_its_forward_pass_written_out(use_smc):
    unet, x = randomise(LiteVAEUNetBlock(12, 6, 8, (1, 2), use_smc=use_smc)), torch.randn(1, 12, 4, 4)

    skips = [unet.in_layer(x)]
    for block in unet.encoder_blocks:
        skips.append(residual(block, skips[-1]))
    h = residual(unet.mid_block.res1, residual(unet.mid_block.res0, skips[-1]))
    for block, skip in zip(unet.decoder_blocks, skips[:0:-1]):  # the last encoder block's output first
        h = residual(block, torch.cat([h, skip], dim=1))
    expected = unet.out_layer(h)

    close(unet(x), expected)
    with torch.no_grad():  # SiLU then works in place
        close(unet(x), expected)
    assert any(isinstance(m, nn.GroupNorm) for m in unet.modules()) != use_smc


# --- 3 and 4  Encoder and decoder ----------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["litevae", "shared", "two levels"])
def test_encoders_equal_their_forward_pass_written_out(variant):
    encoder, image = randomise(VARIANTS[variant](), 0.1).encoder, image_batch(1, 3, 32, 16)
    extract = [encoder.feature_extractor_L1, encoder.feature_extractor_L2, encoder.feature_extractor_L3]
    shrink = [encoder.downsample_block_L1, encoder.downsample_block_L2, nn.Identity()]

    features = [shrink[i](extract[i](HaarTransform().dwt(image, i + 1) / 2 ** (i + 1))) for i in range(3)]
    features = features[1:] if variant == "two levels" else features

    close(encoder(image), encoder.feature_aggregator(torch.cat(features, dim=1)))
    assert (extract[1] is extract[2]) == (variant == "shared")


def test_narrow_networks_have_fewer_groups():
    vae = small_vae()

    encoder, decoder = [{(m.num_channels, m.num_groups) for m in part.modules() if isinstance(m, nn.GroupNorm)}
                        for part in (vae.encoder, vae.decoder)]

    assert encoder == {(16, 16), (32, 32), (48, 16), (64, 32)}
    assert decoder == {(8, 2), (16, 4), (32, 8)}  # of at least four channels


def test_smc_attention_has_queries_and_keys_of_unit_rms():
    block, x = randomise(litevae.SDAttnBlock(8, use_smc=True)), 100 * torch.randn(2, 8, 3, 4)

    q, k, v = [f(x).flatten(2) for f in (block.q, block.k, block.v)]  # (2, 8, 12)
    q, k = [t / t.square().mean(1, keepdim=True).sqrt() for t in (q, k)]
    weights = (q.transpose(1, 2) @ k / 8**0.5).softmax(-1)  # of each query, for each key

    close(block(x), x + block.proj_out((v @ weights.transpose(1, 2)).view_as(x)), atol=1e-3)


# --- 5  The autoencoder -------------------------------------------------------------------------------


def test_posterior_equals_torch_distributions():
    moments, noise = torch.randn(3, 8, 4, 5), torch.randn(3, 4, 4, 5, generator=torch.Generator().manual_seed(5))
    moments[0, 4:6, 0, 0] = torch.tensor([1e4, -1e4])  # log-variances far out
    theirs = torch.distributions.Normal(moments[:, :4], (0.5 * moments[:, 4:].clamp(-30, 20)).exp())
    kl = torch.distributions.kl_divergence(theirs, torch.distributions.Normal(0.0, 1.0)).sum(dim=(1, 2, 3))

    ours = DiagonalGaussianDistribution(moments)
    samples = [ours.sample(torch.Generator().manual_seed(5)), ours.sample(noise=noise)]

    close([ours.mode(), ours.std, ours.kl()], [theirs.mean, theirs.stddev, kl])
    close(samples, 2 * [theirs.mean + theirs.stddev * noise])


@pytest.mark.parametrize("output_type, others", [("image", False), ("wavelet", True)])
def test_autoencoder_equals_its_steps_written_out(output_type, others):
    vae = randomise(small_vae(output_type=output_type, use_smc=others, use_1x1_conv=others), 0.05).double()
    x, noise = image_batch(2, 3, 24, 40).double(), torch.randn(2, 4, 3, 5).double()

    mean, logvar = vae.pre_conv(vae.encoder(x)).chunk(2, dim=1)
    latent = mean + (logvar / 2).exp() * noise
    image = vae.decoder(vae.post_conv(latent))
    wavelet = HaarTransform().dwt(image) / 2
    if output_type == "wavelet":
        image, wavelet = HaarTransform().idwt(2 * image), image
    kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum() / 2  # of a batch of two

    close(list(vae(x, noise=noise)[:4]), [image, wavelet, latent, kl])
    close(vae(x, sample=False).latent, mean)
    assert type(vae.pre_conv) is type(vae.post_conv) is (nn.Conv2d if others else nn.Identity)


@pytest.mark.parametrize("use, complaint", [
    *[(lambda shape=shape: small_vae().encode(torch.zeros(shape)), "multiples of 8 ") for shape in (
        (1, 3, 20, 16), (1, 3, 16, 20), (1, 1, 16, 16), (3, 16, 16))],
    (lambda: small_vae().encode(torch.zeros(1, 3, 16, 16, dtype=torch.uint8)), "got torch.uint8: convert"),
    (lambda: small_vae().decode(torch.zeros(1, 5, 2, 2)), "4, h, w"), (lambda: small_vae(size="XL"), "S, B, M, L")])
def test_bad_arguments_and_inputs_are_refused(use, complaint):
    with pytest.raises(ValueError, match=complaint):
        use()


@pytest.mark.parametrize("build, last, gain", [
    (lambda: small_vae(latent_dim=64, use_smc=True), "encoder.feature_aggregator.out_layer", 4),
    (lambda: small_vae(latent_dim=64, use_1x1_conv=True), "pre_conv", 4),
    (lambda: SDVAE(latent_dim=64, decoder_channels=8), "quant_conv", 1)], ids=["smc", "1x1", "sd-vae"])
def test_initial_weights(build, last, gain, narrow):
    """Convolutions keep the variance, branches start at zero, posteriors are narrow and their means have a gain."""
    vae = build()
    end = vae.get_submodule(last)
    mean, logvar = end.weight.chunk(2)

    assert mean.std().item() == pytest.approx(gain * end.weight[0].numel() ** -0.5, rel=0.05) and not logvar.any()
    assert end.bias.tolist() == 64 * [0] + 64 * [-6]
    for name, conv in vae.named_modules():
        if re.search(r"block.*\.conv_out$|conv2$|proj_out$", name):
            assert not (conv.gain if isinstance(conv, SMC) else conv.weight).any(), name
        elif isinstance(conv, litevae.Downsample2D):  # it starts as the average over each patch
            x = torch.randn(1, 12, 8, 16)
            close(conv(x), F.avg_pool2d(x, conv.kernel_size))
        elif isinstance(conv, nn.Conv2d) and conv.weight.numel() > 4000 and conv is not end:
            assert conv.weight.std().item() == pytest.approx(conv.weight[0].numel() ** -0.5, rel=0.1), name
            assert not conv.bias.any(), name
    torch.manual_seed(0)  # one seed, one decoder, whatever the encoder
    close(vae.decoder.conv_in.weight, small_vae(latent_dim=64).decoder.conv_in.weight)


@pytest.mark.parametrize("block", [HaarTransform, SMC, DiagonalGaussianDistribution, LiteVAEUNetBlock, SDVAEDecoder,
                                   UNetDiscriminator, LPIPS])
def test_blocks_name_the_helpers_to_copy_with_them(block):
    ours = {name for name, value in vars(litevae).items() if getattr(value, "__module__", "") == "litevae"}

    copied = ours.intersection(re.findall(r"\w+", block.__doc__.partition("To copy it, take")[2])) | {block.__name__}
    trees = [ast.parse(inspect.getsource(getattr(litevae, name))) for name in copied]
    needed = {node.id for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Name)}

    assert needed & ours <= copied


def test_part_one_works_without_part_two():
    part_one, module = Path(litevae.__file__).read_text().partition("\n# Part II: ")[0], {"__name__": "part_one"}

    exec(part_one, module)

    assert module["LiteVAE"]("S", decoder_channels=8)(torch.zeros(1, 3, 8, 8)).sample.isfinite().all()


# --- 6  Losses: Eq. 1 is written out below, with the runs of train.py ----------------------------------


def test_losses_by_hand():
    w, w_hat = torch.zeros(2, 1, 12, 2, 2)
    w_hat[:, :3], w_hat[:, 3:6] = 5.0, 0.3  # L, which does not count, and H, a third of what counts
    assert litevae.wavelet_loss(w_hat, w).item() == pytest.approx((math.hypot(0.3, 1e-3) + 2e-3) / 3, rel=1e-5)

    posterior = mock.Mock(kl=lambda: torch.tensor([90.0, 54.0]))  # of a batch of two
    assert litevae.kl_loss(posterior, image_batch(2, 3, 16, 24)).item() == pytest.approx(72 / (3 * 16 * 24))
    assert litevae.LOSS_WEIGHTS["kl"] == 1e-6  # LDM's

    bce, real, fake = F.binary_cross_entropy_with_logits, torch.randn(5), torch.randn(5)
    close(litevae.logistic_d_loss(real, fake), bce(real, torch.ones(5)) + bce(fake, torch.zeros(5)))
    close(litevae.logistic_g_loss(fake), bce(fake, torch.ones(5)))

    w = torch.ones(2, requires_grad=True)
    assert litevae.adaptive_weight(w.sum(), 0 * w.sum(), w).item() == 0.5e4  # the ceiling


def test_gaussian_loss_equals_scipys_filter():
    x, x_hat = image_batch(2, 3, 12, 17), image_batch(2, 3, 12, 17)
    blur = functools.partial(scipy.ndimage.gaussian_filter, sigma=(0, 0, 1.0, 1.0), mode="nearest", radius=(0, 0, 2, 2))

    expected = np.abs((x.numpy() - blur(x.numpy())) - (x_hat.numpy() - blur(x_hat.numpy()))).mean()

    assert litevae.gaussian_loss(x_hat, x).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("net", ["vgg", "alex", "squeeze"])
def test_lpips_equals_the_lpips_package(vgg, net):
    ours, theirs = LPIPS(net).train(), lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
    file = torch.load(vgg / "checkpoints" / LPIPS.files[net], weights_only=True)
    for slice_ in theirs.net.children():
        slice_.load_state_dict({k: file[f"features.{k}"] for k in slice_.state_dict()})
    x, y = image_batch(3, 3, 32, 40), image_batch(3, 3, 32, 40)

    with torch.autocast("cpu", dtype=torch.bfloat16):  # computed in float32 all the same
        distances = ours(x, y)

    close(distances, theirs(x, y).flatten())
    for p in ours.net.net.parameters():
        p.zero_()  # features of 0, where lpips's norm has no gradient
    ours(x.requires_grad_(True), y).sum().backward()
    assert x.grad.isfinite().all()


# --- 7  Discriminator ---------------------------------------------------------------------------------


def test_unet_discriminator_equals_its_forward_written_out():
    d, x, leaky = UNetDiscriminator(8).eval(), image_batch(3, 3, 40, 72), nn.LeakyReLU(0.2)

    def block(module, x):
        h = x if x.shape[1] == 3 else leaky(x)  # pixels go in as they are
        return module.skip_connection(x) + module.conv_out(leaky(module.conv_in(h)))

    h, skips = x, []
    for module in d.down:
        skips.append(h)
        h = F.avg_pool2d(block(module, h), 2)
    logit = d.to_global(leaky(h).mean((2, 3)))
    for module, skip in zip(d.up, reversed(skips)):
        h = block(module, F.interpolate(h, skip.shape[2:]))
        h = h if skip is x else torch.cat([h, skip], dim=1)

    close(d(x), (logit, d.to_pixel(leaky(h))))
    assert [b.conv_out.out_channels for b in d.up] == [32, 16, 8, 8]
    assert sum(name.endswith("weight.original") for name in d.state_dict()) == 26  # have spectral normalisation


# --- 8  Checkpoints -----------------------------------------------------------------------------------


@pytest.mark.parametrize("spoil, words", [
    (lambda path: path.write_bytes(path.read_bytes().replace(b"conv_in", b"conv_on")), "it is damaged .the checksum"),
    (Path.unlink, "no checkpoint at "),
    (lambda path: torch.save({"format": "litevae-1"}, path), "another version of this program wrote it"),
    (lambda path: torch.save({"format": "litevae-2", "config": {"blocks": 3}}, path), "describes no model")])
def test_no_whole_checkpoint_is_refused_in_one_sentence(spoil, words, tmp_path):
    save_checkpoint(tmp_path / "c.pt", small_vae())
    spoil(tmp_path / "c.pt")

    with pytest.raises((litevae.CheckpointError, FileNotFoundError), match=words) as error:
        LiteVAE.from_checkpoint(tmp_path / "c.pt")
    assert "\n" not in str(error.value)


def test_a_failed_save_leaves_the_previous_checkpoint_alone(tmp_path, monkeypatch):
    (tmp_path / "c.pt").write_text("the previous one")
    monkeypatch.setattr(torch, "save", mock.Mock(side_effect=RuntimeError("PytorchStreamWriter failed writing")))

    with pytest.raises(OSError, match="could not be written"):
        litevae.write_checkpoint(tmp_path / "c.pt", {})
    assert [file.read_text() for file in tmp_path.iterdir()] == ["the previous one"]


def test_a_checkpoint_is_on_the_disk_before_it_replaces_one(tmp_path, monkeypatch):
    sizes = []
    monkeypatch.setattr(os, "fsync", lambda handle: sizes.append((tmp_path / "c.pt.partial").stat().st_size))
    monkeypatch.setattr(torch, "save", lambda checkpoint, file: file.write(bytes(1000)))

    litevae.write_checkpoint(tmp_path / "c.pt", {})

    assert sizes == [1000]  # flushed before it was synchronised


def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path):
    """A process does nothing but save: whoever reads meanwhile sees a whole file, and so does who finds it killed."""
    path = tmp_path / "c.pt"
    code = ("import sys, litevae\nvae = litevae.LiteVAE('S', decoder_channels=8)\n"
            "while True:\n    litevae.save_checkpoint(sys.argv[1], vae)\n    print(flush=True)")

    process = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, cwd=HERE)
    try:
        process.stdout.readline()  # the first checkpoint is there
        for _ in range(60):
            assert zipfile.ZipFile(io.BytesIO(path.read_bytes())).testzip() is None
    finally:
        process.kill()
        process.wait()

    LiteVAE.from_checkpoint(path)


class Malicious:
    """What a malicious file holds: reading it as Python objects would create a folder."""

    def __reduce__(self):
        return os.mkdir, ("unpickled",)


@pytest.mark.parametrize("reads", [lambda path: litevae.load_features([], path.name), load_checkpoint,
                                   lambda path: evaluation.load_inception(path)])
def test_files_are_read_without_running_code(reads, offline, monkeypatch):
    monkeypatch.chdir(offline)
    path = offline / "x.pth"
    torch.save({"features.0.weight": Malicious()}, path)

    with pytest.raises((FileNotFoundError, train.UsageError, litevae.CheckpointError), match=re.escape(str(path))) as e:
        reads(path)
    assert "\n" not in str(e.value) and list(offline.iterdir()) == [path]


# --- 9 and 10  Baselines and other encoder parts -------------------------------------------------------


def test_sd_vae_equals_diffusers_with_the_same_weights(tmp_path):
    theirs = diffusers.AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4).eval()
    theirs.save_pretrained(tmp_path)
    ours, x = LiteVAE.from_checkpoint(tmp_path / "diffusion_pytorch_model.safetensors"), image_batch(1, 3, 32, 48)
    older = theirs.state_dict()
    for new, old in (("to_q.", "query."), ("to_k.", "key."), ("to_v.", "value."), ("to_out.0.", "proj_attn.")):
        older = {name.replace(new, old): tensor for name, tensor in older.items()}

    with torch.no_grad():
        [a], [b] = [vae.encode(x, return_dict=False) for vae in (ours, theirs)]
        images = [vae.decode(b.mean, return_dict=False, generator=None)[0] for vae in (ours, theirs)]

    for value, expected in ((a.mean, b.mean), (a.logvar, b.logvar), images):
        assert (value - expected).abs().max() < 1e-4 * expected.abs().max()
    assert ours.name == "SD-VAE" and ours.config.scaling_factor == ours.config["scaling_factor"] == 0.18215
    for name in ("latent_channels", "block_out_channels"):
        assert getattr(ours.config, name) == getattr(theirs.config, name)
    assert (ours.dtype, ours.device) == (theirs.dtype, theirs.device)
    assert_same_weights(litevae.released_sd_vae(older)["model"], ours.state_dict())


@pytest.mark.parametrize("prefix, save", [  # alone, or in a whole diffusion model
    ("", torch.save), ("", safetensors.torch.save_file), ("first_stage_model.", torch.save)])
def test_every_layout_of_released_files_loads_strictly(prefix, save, narrow, tmp_path):
    weights, dtypes = randomise(SDVAE(decoder_channels=8)).state_dict(), (torch.half, torch.bfloat16, torch.double)
    weights = {name: tensor.to(dtype) for (name, tensor), dtype in zip(weights.items(), itertools.cycle(dtypes))}
    others = {"loss.logvar": torch.zeros(()), "model_ema.decay": torch.tensor(0.999),
              "cond_stage_model.encoder.conv_in.weight": torch.zeros(3), "model.diffusion_model.out": torch.zeros(4)}

    def load(weights):
        state = {**{prefix + name: tensor for name, tensor in weights.items()}, **others}
        save({"state_dict": state, "epoch": 4} if prefix else state, tmp_path / "model")
        return LiteVAE.from_checkpoint(tmp_path / "model").state_dict()

    assert_same_weights(load(weights), {name: tensor.float() for name, tensor in weights.items()})
    with pytest.raises(litevae.CheckpointError, match=r"encoder.extra has shape \(7,\), the model wants None"):
        load({**weights, "encoder.extra": torch.zeros(7)})


def test_dwt_latents_equal_pywavelets_and_have_no_spread():
    x = image_batch(2, 3, 32, 48, dtype=torch.float64)
    low, (h3, v3, d3), (h2, v2, d2), _ = pywt.wavedec2(x.numpy(), "haar", level=3)
    details = np.concatenate([h2, v2, d2], axis=1) / 4  # (2, 9, 8, 12)
    in_depth = np.stack([details[:, c, i::2, j::2] for c, i, j in np.ndindex(9, 2, 2)], axis=1)
    expected = torch.from_numpy(np.concatenate([low / 8, h3 / 8, v3 / 8, d3 / 8, in_depth], axis=1))

    for model, channels in (("dwt", 12), ("dwt-2", 48)):
        posterior = VARIANTS[model]().double().encode(x).latent_dist
        close(posterior.mode(), expected[:, :channels], rtol=0, atol=1e-12)
        assert torch.equal(posterior.sample(), posterior.mode()) and posterior.kl().tolist() == [0, 0]


def test_naf_block_equals_spandrels_and_nothing_is_added_to_it():
    theirs, net, x = randomise(NAFNet_arch.NAFBlock(6), 0.5), litevae.NAFNetExtractor(6, 6, 1), torch.randn(2, 6, 5, 7)
    net.blocks[0].load_state_dict(theirs.state_dict())

    close(net(x), net.out_layer(theirs(net.in_layer(x))))


def test_vit_equals_pytorchs_transformer_over_positions():
    vit, x = randomise(litevae.ViTAggregator(5, 8, 3, 64, depth=2), 0.05), torch.randn(2, 5, 3, 3)
    layer = nn.TransformerEncoderLayer(64, nhead=2, dim_feedforward=256, dropout=0.0, activation="gelu",
                                       batch_first=True, norm_first=True, layer_norm_eps=1e-6)
    theirs = nn.TransformerEncoder(layer, 2, nn.LayerNorm(64, eps=1e-6), enable_nested_tensor=False)
    state = {name: tensor for name, tensor in vit.state_dict().items() if name.startswith(("blocks.", "norm."))}
    for a, b in {"blocks.": "layers.", "qkv.": "self_attn.in_proj_", "proj.": "self_attn.out_proj.",
                 "mlp.0": "linear1", "mlp.2": "linear2"}.items():
        state = {name.replace(a, b): tensor for name, tensor in state.items()}
    theirs.load_state_dict(state)

    maps = vit.in_layer(x)
    tokens = torch.stack([maps[..., i, j] for i, j in np.ndindex(3, 3)], dim=1) + vit.positions  # (2, 9, 64)
    expected = vit.out_layer(theirs(tokens).mT.view(2, 64, 3, 3))

    close(vit(x), expected)


def test_networks_have_the_published_sizes():
    networks = {  # the paper's, StyleGAN2's config F at 256x256, and what the paper leaves open
        SDVAEDecoder: 49_490_179, lambda: SDVAEDecoder(use_smc=True): 49_480_228,
        lambda: LiteVAE("S", output_type="wavelet").decoder: 47_856_908,
        litevae.SDVAEEncoder: 34_163_592, lambda: litevae.build_small_encoder(4): 6_757_584,
        lambda: litevae.build_variant_encoder("B", 12, aggregator="vit", resolution=128).feature_aggregator: 841_176,
        lambda: litevae.NAFNetExtractor(12, *litevae.NAFNETS["S"]): 261_900,
        litevae.PatchDiscriminator: 2_764_737, lambda: litevae.StyleGANDiscriminator(256, 128): 28_864_129}

    with torch.device("meta"):
        counts = [count(build()) for build in networks]
        encoders = [count(litevae.build_encoder(size)) for size in PRESETS]

    assert counts == list(networks.values())
    assert encoders == [preset["params"] for preset in PRESETS.values()]


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_reach_every_weight_of_every_variant(variant, narrow):
    vae, x = VARIANTS[variant](), image_batch(2, 3, 16, 16)
    start, half = vae(x, sample=False), copy.deepcopy(vae).bfloat16()(x, sample=False).latent

    out = randomise(vae, 0.02)(x, sample=False)  # off the zeros that branches start at
    (autoencoder_loss(out, x)[0] + out.kl_reg).backward()
    again = LiteVAE.from_checkpoint({"config": dict(vae.config), "model": vae.state_dict()})

    assert start.sample.abs().max() < 12 and start.latent.abs().max() < 10  # a sane start
    dead = [name for name, p in vae.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # What stands before a softmax over keys that shifts all alike, and before a norm over one value, has no effect.
    assert not [name for name in dead if not re.search(r"attn_1\.k\.bias|qkv\.bias", name)], dead
    assert again.name == vae.name
    assert again.decoder.conv_in.weight.data_ptr() != vae.decoder.conv_in.weight.data_ptr()  # of a copy
    close(again(x, sample=False).sample, out.sample)
    assert half.dtype == torch.bfloat16 and (half - start.latent).abs().max() < 0.1 * start.latent.abs().max() + 0.05


# --- 11 and 12  Other losses and discriminators --------------------------------------------------------


def test_esrgan_loss_equals_torchvisions_vgg(vgg):
    x, y = image_batch(2, 3, 32, 32), image_batch(2, 3, 32, 32)
    with torch.device("meta"):
        vgg19 = torchvision.models.vgg19().features[:35]  # up to conv5_4, before its activation
    weights = torch.load(vgg / "checkpoints" / "vgg19-dcbb9e9d.pth", weights_only=True)
    vgg19.load_state_dict({k: weights[f"features.{k}"] for k in vgg19.state_dict()}, assign=True)
    normalise = torchvision.transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])

    a, b = (vgg19(normalise((v + 1) / 2)) for v in (y, x))

    close(litevae.ESRGANPerceptual()(y, x), (a - b).abs().mean(dim=(1, 2, 3)))


def test_ldl_weighs_l1_by_its_artifact_map():
    x_hat, x, x_ema = 2 * torch.rand(3, 2, 3, 9, 11, dtype=torch.float64) - 1
    map_ = torch.zeros(2, 1, 9, 11, dtype=torch.float64)
    for b in range(2):
        residual, ema = ((a[b] - x[b]).abs().sum(0).numpy() / 2 for a in (x_hat, x_ema))  # of images in [0, 1]
        local = scipy.ndimage.generic_filter(residual, np.var, 7, mode="mirror", extra_keywords={"ddof": 1})
        map_[b, 0] = torch.from_numpy((residual >= ema) * local * residual.var(ddof=1) ** 0.2)

    same, x_hat = x.clone().requires_grad_(True), x_hat.requires_grad_(True)
    loss = litevae.ldl_loss(x_hat, x, x_ema)
    (loss + litevae.ldl_loss(same, x, x)).backward()

    close(loss, (map_ * (x_hat - x).abs() / 2).mean())
    close(x_hat.grad, map_ * (x_hat - x).sign() / 2 / x_hat.numel(), atol=1e-9)  # the map is a constant
    assert not same.grad.any()  # nor NaN


def test_each_logit_of_patchgan_judges_70_pixels():
    discriminator, x = litevae.PatchDiscriminator(4), image_batch(2, 3, 104, 88).requires_grad_(True)

    (logits,) = discriminator(x)
    logits[0, 0, 5, 4].backward()

    seen = x.grad.abs().sum(1).nonzero()  # image, row, column
    assert (seen.amax(0) - seen.amin(0) + 1).tolist() == [1, 70, 70] and seen[0, 0] == 0
    assert logits.shape == (2, 1, 104 // 8 - 2, 88 // 8 - 2)
    assert sum(name.endswith("weight.original") for name in discriminator.state_dict()) == 5  # of spectral norms
    assert [m.negative_slope for m in discriminator.modules() if isinstance(m, nn.LeakyReLU)] == 4 * [0.2]


def test_stylegan_discriminator_equals_its_layers_written_out():
    d, x = randomise(litevae.StyleGANDiscriminator(16, 8), 0.3), image_batch(8, 3, 16, 16)
    x[4:] /= 10  # two groups that differ
    kernel = np.outer([1, 3, 3, 1], [1, 3, 3, 1]).reshape(1, 1, 4, 4) / 64

    def conv(module, x, stride=1, padding=0):
        return F.conv2d(x, module.weight / module.weight[0].numel() ** 0.5, module.bias, stride, padding)

    def leaky(x):
        return F.leaky_relu(x, 0.2) * 2**0.5

    def blur(x, padding):
        x = F.pad(x, 4 * (padding,)).detach().numpy()
        return torch.from_numpy(scipy.signal.convolve(x, kernel, mode="valid")).float()

    h = leaky(conv(d.from_rgb, x))
    for block in d.blocks:
        skip = conv(block.skip_connection, blur(h, 1), stride=2)
        h = leaky(conv(block.conv_out, blur(leaky(conv(block.conv_in, h, padding=1)), 2), stride=2))
        h = (skip + h) / 2**0.5
    # The mean over positions and channels of the deviation among four neighbours in the batch.
    std = torch.stack([h[i:i + 4].std(0, correction=0).mean() for i in (0, 4)]).repeat_interleave(4)
    h = torch.cat([h, std.view(8, 1, 1, 1).expand(8, 1, 4, 4)], dim=1)
    h = leaky(conv(d.dense, leaky(conv(d.conv, h, padding=1))))

    close(d(x)[0], conv(d.out, h).flatten(1), atol=1e-4)
    fresh = litevae.EqualizedConv2d(50, 40, 3)
    assert fresh.weight.std().item() == pytest.approx(1, abs=0.02) and not fresh.bias.any()


# --- train.py: images ---------------------------------------------------------------------------------


@pytest.mark.parametrize("built_in, label, row", [
    (train.DeadLeaves, 0, [[118.05, 124.275, 130.8, 123.725, 139.9, 123.775], [
        113.025, 109.65, 118.0, 106.95, 129.35, 116.675], [114.625, 106.325, 111.55, 91.6, 114.35, 94.5]]),
    (train.Shapes, 3, [[123.05, 134.2, 123.275, 123.025, 131.875, 127.525], [
        126.925, 140.3, 124.675, 128.675, 145.575, 131.525], [123.55, 134.525, 125.15, 139.1, 145.175, 127.125]])])
def test_built_in_images_are_those_the_shipped_model_learned(built_in, label, row):
    data = built_in(32, seed=3)

    images = torch.stack([data[i][0] for i in range(40)])

    assert images.shape == (40, 3, 32, 32) and images.dtype == torch.uint8 and data[6][1] == label
    mean = images.double().mean(0)[:, 16, ::6]  # red, green, blue along a row
    assert np.abs(mean.numpy() - row).max() < 0.1


def readable(folder):
    return [f for f in train.find_images(folder) if Path(f).name not in ("broken.jpg", "empty.png")]


def test_epochs_are_shuffled_and_the_next_replaces_a_broken_file(folder):
    files = train.find_images(folder)
    plain = train.ImageFolder(files, 16, augment=False, labels=list(range(8)))
    shuffled = train.ImageFolder(files, 16, seed=3, labels=list(range(8)))

    images, labels = zip(*[plain[i] for i in range(8)])
    epochs = [shuffled[i][1] for i in range(16)]

    assert labels == (0, 2, 2, 3, 4, 5, 7, 7) and [files[i] for i in sorted({*labels})] == readable(folder)
    assert all(torch.equal(image, load_square(files[label], 16)) for image, label in zip(images, labels))
    assert epochs == [labels[i] for n in (0, 1) for i in np.random.default_rng((3, n)).permutation(8)]


def test_every_kind_of_image_comes_out_as_upright_rgb(tmp_path):
    def loaded(image, name="x.png", **how):
        image.save(tmp_path / name, **how)
        return train.load_image(tmp_path / name, 16).astype(int)

    red, upright, exif = Image.new("RGB", (16, 16), "red"), Image.new("RGB", (16, 16), "blue"), Image.Exif()
    upright.paste("red", (0, 0, 16, 4))  # red on top
    exif[0x0112] = 6  # stored turned: viewers rotate it by 90 degrees clockwise

    turned = loaded(upright.transpose(Image.Transpose.ROTATE_90), "x.jpg", exif=exif, quality=100)

    assert turned[1, 8, 0] > 200 > 50 > turned[12, 8, 0]
    for image, colour in [(red.quantize(4), (255, 0, 0)), (Image.new("LA", (16, 16), (30, 255)), (30, 30, 30)),
                          (Image.new("RGBA", (16, 16), (9, 9, 9, 0)), (255, 255, 255)),  # on white
                          (Image.fromarray(np.full((16, 16), 250 * 257 + 250, dtype=np.uint16)), (250, 250, 250))]:
        assert (loaded(image) == colour).all(), image.mode
    assert np.abs(loaded(red.convert("CMYK"), "x.tif") - (255, 0, 0)).max() <= 2
    with pytest.raises(OSError, match="32 times"):
        loaded(Image.new("L", (1, 33)))


@pytest.mark.parametrize("long", [0, 1], ids=["wide", "tall"])
def test_augmentation_of_an_image_of_coordinates(long, tmp_path):
    """Red grows along x, green along y: each crop tells where it was taken, how large it was, and if it was flipped."""
    y, x = np.mgrid[:160, :240] if long == 0 else np.mgrid[:240, :160]
    Image.fromarray(np.stack([x, y, 0 * x], -1).astype(np.uint8)).save(tmp_path / "x.png")
    data = train.ImageFolder([str(tmp_path / "x.png")], 32, seed=1)

    def where(crop):
        """Its middle and its sides, each as x, y, in pixels of the image."""
        lines = np.stack([crop[0].float().mean(0), crop[1].float().mean(1)])  # (2, 32)
        return lines.mean(1), 32 * (lines[:, 27] - lines[:, 4]) / 23

    centre, side = map(np.array, zip(*[where(data[i][0]) for i in range(200)]))  # (200, 2) each
    place = (centre - np.abs(side) / 2)[:, long] / (240 - np.abs(side[:, long]))  # 0 at one end, 1 at the other
    middle, whole = where(load_square(tmp_path / "x.png", 32))

    assert middle == pytest.approx([x.mean(), y.mean()], abs=1) and whole == pytest.approx([160, 160], rel=0.04)
    assert 60 < (side[:, 0] < 0).sum() < 140 and (side[:, 1] > 0).all()  # half of them flipped, none upside down
    assert np.abs(side[:, 0]) == pytest.approx(side[:, 1], rel=0.06)  # not stretched
    assert np.quantile(side[:, 1], [0, 0.5, 1]) == pytest.approx([0.8 * 160, 0.89 * 160, 160], rel=0.03)
    assert np.quantile(place, [0, 0.5, 1]) == pytest.approx([0, 0.5, 1], abs=0.15)


def opened(**options):
    """What open_images makes of --data and --val: the images to train on, and those held out."""
    return train.open_images(argparse.Namespace(**{"val": None, "resolution": 8, "seed": 5} | options), None)


def test_held_out_images_are_spread_and_not_trained_on(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "HELD_OUT", 6)
    for folder, name in enumerate("abc"):
        (tmp_path / name).mkdir()
        for i in range(50):
            Image.new("RGB", (8, 8), (folder, i, 9)).save(tmp_path / name / f"{i:02}.png")
    (tmp_path / "a" / "up").symlink_to(tmp_path, target_is_directory=True)  # a folder is entered once
    (tmp_path / "link").symlink_to(tmp_path / "b")
    colours = lambda items: [tuple(image[:2, 0, 0].tolist()) for image, _ in items]  # noqa: E731

    dataset, held_out = opened(data=tmp_path)
    every, chosen = opened(data=tmp_path, val=tmp_path)
    others, inside = opened(data=tmp_path, val=tmp_path / "link")
    _, few = opened(data=tmp_path / "b")

    assert colours(held_out) == colours(chosen) == [(0, 0), (0, 25), (1, 0), (1, 25), (2, 0), (2, 25)]
    assert len(dataset) == 144 and not set(colours(held_out)) & set(colours(dataset[i] for i in range(144)))
    assert len(every) == 150  # where none would be left, all are trained on
    assert {folder for folder, _ in colours(inside)} == {1}
    assert {folder for folder, _ in colours(others[i] for i in range(100))} == {0, 2} and len(others) == 100
    assert colours(few) == [(1, 0), (1, 16), (1, 33)]  # 1 in 20


# --- train.py: around the loop ------------------------------------------------------------------------


def test_a_log_goes_on_behind_its_checkpoint_and_knows_the_speed(tmp_path, monkeypatch):
    clock = iter([0.0, 2.0, 5.0, 10.0, 11.0])
    monkeypatch.setattr(train, "time", mock.Mock(monotonic=lambda: next(clock)))
    args = argparse.Namespace(out=tmp_path, batch_size=6)

    log = train.Log(args, 0)
    log.write(4, {"loss": 1.0})
    log.write(6, {"loss": 2.0, "psnr": 20.0})
    first = rows(tmp_path)
    train.Log(args, 4).write(5, {"loss": 3.0})  # from a checkpoint of step 4
    second = rows(tmp_path)

    assert first == [{"step": "4", "loss": "1", "images_per_second": "12", "psnr": ""},
                     {"step": "6", "loss": "2", "images_per_second": "4", "psnr": "20"}]
    assert [(row["step"], row["images_per_second"]) for row in second] == [("4", "12"), ("5", "6")]


def test_bf16_is_automatic_on_cpus_built_for_it(monkeypatch):
    for has, bf16 in (({"avx512_bf16": True}, True), ({"amx_bf16": True}, True), ({"avx512_f": True}, False)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has, raising=False)
        assert train.Machine("cpu").bf16 == bf16 and train.Machine("cpu", "bf16").bf16
        assert not train.Machine("cpu", "fp32").bf16


# --- train.py: whole runs -----------------------------------------------------------------------------

RESUMED = {
    "folder and workers": (train, [*GAN, "--size", "S", "--perceptual", "none", "--workers", 2, "--data", "{images}"]),
    "ablations": (train, ["--extractor", "nafnet", "--shared-extractor", "--aggregator", "vit", "--discriminator",
                          "stylegan", *DISC, "--adaptive-weight", "--weight-ldl", 1, "--batch-size", 4]),
    "diffusion": (sample_ldm, ["--data", "{classes}", "--workers", 2]),
    "classes": (sample_ldm, ["--data", "{classes}", "--class-cond", "--cache-latents"])}


@pytest.mark.parametrize("case", RESUMED)
def test_resume_equals_an_uninterrupted_run_to_the_bit(case, tmp_path, folder, class_folder, tiny_ldm, narrow):
    script, options = RESUMED[case]
    options = [str(o).format(images=folder, classes=class_folder) for o in options] + ["--log-every", 3]
    held_out = "psnr" if script is train else "val_loss"

    a, whole = trained(tmp_path / "a", *options, "--save-every", 4, "--steps", 7, script=script)
    trained(tmp_path / "b", *options, "--save-every", 4, "--steps", 5, script=script)
    b, both = resumed(tmp_path / "b", "--steps", 7, script=script)

    assert same(whole, both)
    assert [[int(r["step"]) for r in log] for log in (a, b)] == [[1, 3, 4, 6, 7], [1, 3, 4, 5, 6, 7]]
    assert a[-1]["loss"] == b[-1]["loss"] and a[-1][held_out] == b[-1][held_out] != ""


def send_in_step(number, step, patch):
    """Have this process receive a signal in that step of its runs."""
    rate = train.learning_rate

    def learning_rate(current, args):
        if current == step:
            os.kill(os.getpid(), number)
        return rate(current, args)
    patch.setattr(train, "learning_rate", learning_rate)


@pytest.mark.parametrize("script, number", [(train, signal.SIGHUP), (sample_ldm, signal.SIGINT)])
def test_a_stop_signal_saves_first(script, number, tmp_path, monkeypatch, tiny_ldm):
    signal.signal(number, signal.SIG_DFL)  # nohup may have changed it
    _, whole = trained(tmp_path / "b", "--steps", 6, script=script)

    with monkeypatch.context() as patch:
        send_in_step(number, 3, patch)
        assert run(script, *TINY[script], "--steps", 6, "--out", tmp_path / "a") == 128 + number
    checkpoint = checkpoint_of(tmp_path / "a")

    assert checkpoint["step"] == 4 and checkpoint.get("vae", checkpoint)["config"]["scaling_factor"] != 1  # is measured
    assert signal.getsignal(number) == signal.SIG_DFL  # a second one would have ended the process
    assert same(resumed(tmp_path / "a", script=script)[1], whole)


def test_a_second_signal_during_the_report_loses_nothing(tmp_path, monkeypatch):
    send_in_step(signal.SIGTERM, 2, monkeypatch)
    monkeypatch.setattr(train.AutoencoderTask, "report", mock.Mock(side_effect=SystemExit))  # as a second signal does

    with pytest.raises(SystemExit):
        run(train, *TINY[train], "--steps", 5, "--out", tmp_path / "a")

    assert checkpoint_of(tmp_path / "a")["step"] == 3


def poison(monkeypatch, bad):
    """Make the batches of these numbers, counted from 0, not a number."""
    images, numbers = train.Machine.images, itertools.count()
    monkeypatch.setattr(train.Machine, "images",
                        lambda self, batch: images(self, batch) * (math.nan if next(numbers) in bad else 1.0))


@pytest.mark.parametrize("script, options", [(train, GAN), (sample_ldm, [])])
def test_a_step_that_is_not_finite_is_skipped_and_counted(script, options, tmp_path, monkeypatch, tiny_ldm):
    poison(monkeypatch, {2, 4})

    log, checkpoint = trained(tmp_path / "a", *options, "--steps", 6, script=script)
    longer, _ = resumed(tmp_path / "a", "--steps", 7, script=script)

    assert [r["skipped"] for r in log] == ["0", "0", "1", "1", "2", "2"] and longer[-1]["skipped"] == "2"
    assert checkpoint["training"]["skipped"] == 2 and checkpoint["training"]["ema_updates"] == 4
    assert all(v.isfinite().all() for k in ("model", "ema") for v in checkpoint[k].values())


@pytest.mark.parametrize("bad, report, end", [
    (range(100), 30.0, "of 3 steps up to step 9 are not finite"),  # in a row
    ({0, 2, 3, 4}, 30.0, "of 2 steps up to step 10 are not finite"),  # would be saved then
    ({}, math.nan, "EMA weights of step 10 are not finite")])
def test_what_is_not_finite_replaces_no_good_checkpoint(bad, report, end, finished_run, tmp_path, monkeypatch, capsys):
    good, path = checkpoint_of(finished_run), tmp_path / "a" / "checkpoint.pt"  # of six steps
    for key in ("model", "adv_loss", "adaptive_weight", "weight_ldl", *train.VARIANT):
        del good["args"][key]  # from before these options existed: it goes on
    path.parent.mkdir()
    litevae.write_checkpoint(path, good)
    monkeypatch.setattr(train, "MAX_BAD_STEPS", 3)
    monkeypatch.setattr(train.AutoencoderTask, "report", lambda self, step: {"psnr": report})
    poison(monkeypatch, bad)

    assert run(train, "--resume", "--save-every", 10, "--steps", 12, "--out", tmp_path / "a") == 1

    error = capsys.readouterr().err
    assert end in error and "--lr" in error and "--resume" in error and "Traceback" not in error
    assert same(checkpoint_of(tmp_path / "a"), good)


def prepared(*options):
    """The task that train.py makes of these options, and its first batch."""
    args, checkpoint = train.parse_args([str(o) for o in (*TINY[train], *options)])
    task, data, _ = train.prepare(args, train.Machine("cpu", args.precision), checkpoint)
    return task, next(train.batches(data, args.batch_size, 0, task.machine, 0))


UNUSUAL = {  # an unusual value for each number of a run
    "seed": 3, "batch_size": 4, "resolution": 16, "steps": 6, "lr": 3e-4, "beta1": 0.3, "beta2": 0.7, "lr_warmup": 2,
    "lr_decay": 0.5, "clip": 0.5, "ema": 0.2}


def typed(options):
    """A dict of options as they are typed."""
    return [word for key, value in options.items() for word in (train.flag(key), value)]


def written_out(loss, module, adam, step):
    """One update with UNUSUAL's learning rate, clipping and Adam, by PyTorch's own means."""
    for group in adam.param_groups:
        group["lr"] = 3e-4 * min((step + 1) / 2, 1, (6 - step) / 3)
    adam.zero_grad()
    loss.backward()
    norm = nn.utils.clip_grad_norm_(module.parameters(), 0.5)
    adam.step()
    return norm


def follow(ema, model, step):
    decay = min(0.2, (1 + step) / (10 + step))
    for average, new in zip(ema.parameters(), model.parameters()):
        average.data = decay * average + (1 - decay) * new.detach()


def gap(found, expected, start, names=""):
    """How far weights are from the expected ones, as a share of the way from the start."""
    expected = {name: tensor for name, tensor in expected.state_dict().items() if name.startswith(names)}
    distance = lambda other: sum((expected[k] - other[k]).square().sum() for k in expected).sqrt().item()  # noqa: E731
    return distance(found) / distance(start)


def test_a_run_equals_equation_1_written_out(tmp_path, vgg):
    """Six steps of autoencoder and discriminator in which every option has an unusual value."""
    weights = {"l1": 0.9, "mse": 0.5, "kl": 0.01, "perceptual": 0.6, "wavelet": 0.3, "gaussian": 0.4, "adv": 0.2}
    model = {"size": "S", "latent_dim": 5, "decoder_channels": 8, "output_type": "wavelet"}
    log, checkpoint = trained(
        tmp_path / "a", *typed(UNUSUAL | model | {f"weight_{k}": w for k, w in weights.items()}), "--no-use-smc",
        "--use-1x1-conv", "--perceptual", "lpips", "--discriminator", "unet", "--disc-channels", 8, "--disc-start", 3,
        "--disc-warmup", 2)

    torch.manual_seed(3)
    vae, d = LiteVAE(**model, use_smc=False, use_1x1_conv=True).train(), UNetDiscriminator(8).train()
    ema, images, lpips_loss = copy.deepcopy(vae), train.DeadLeaves(16, 3), LPIPS()
    start, d_start = copy.deepcopy((vae.state_dict(), d.state_dict()))
    vae_adam, d_adam = [torch.optim.Adam(m.parameters(), betas=(0.3, 0.7)) for m in (vae, d)]
    for step, row in enumerate(log):
        x = torch.stack([images[4 * step + i][0] for i in range(4)]) / 127.5 - 1
        torch.manual_seed(3 * 1_000_003 + step)
        q = vae.encode(x).latent_dist
        out = vae.decode(q.mean + q.std * torch.randn(4, 5, 2, 2))
        terms = {"l1": (out.sample - x).abs().mean(), "mse": (out.sample - x).square().mean(),
                 "perceptual": lpips_loss(out.sample, x).mean(), "gaussian": litevae.gaussian_loss(out.sample, x),
                 "wavelet": litevae.wavelet_loss(out.wavelet, HaarTransform().dwt(x) / 2)}
        recon = sum(weights[k] * value for k, value in terms.items())
        terms["kl"], ramp = litevae.kl_loss(q, x), 0
        if step >= 3:
            ramp = min(1, (step - 2) / 2)
            terms["adv"] = -sum(logits.mean() for logits in d(out.sample))
        loss = recon + 0.01 * terms["kl"] + 0.2 * ramp * terms.get("adv", 0)
        norm = written_out(loss, vae, vae_adam, step)
        follow(ema, vae, step)
        expected = {**terms, "recon": recon, "loss": loss, "grad_norm": norm, "lr": vae_adam.param_groups[0]["lr"],
                    "latent_std": q.mean.std(), "posterior_std": q.std.mean(), "latent_max": q.mean.abs().max(),
                    "kl_nats": q.kl().mean()}
        if step >= 1:
            logits = d(torch.cat([x, out.sample.detach()]))
            expected["d_loss"] = sum(F.relu(1 - l[:4]).mean() + F.relu(1 + l[4:]).mean() for l in logits)
            expected["logits_real"] = sum(l[:4].mean() for l in logits) / 2
            expected["logits_fake"] = sum(l[4:].mean() for l in logits) / 2
            written_out(expected["d_loss"], d, d_adam, step)
        if step >= 3:
            expected["adv_weight"] = 0.2 * ramp
        for name, value in expected.items():
            assert float(row[name]) == pytest.approx(torch.as_tensor(value).item(), rel=2e-3, abs=2e-5), (step, name)
        assert (row["d_loss"] == "") == (step < 1) and (row["adv"] == "") == (step < 3)
    assert gap(checkpoint["model"], vae, start) < 1e-3 and gap(checkpoint["ema"], ema, start) < 1e-3
    assert gap(checkpoint["training"]["discriminator"], d, d_start) < 1e-3


def test_a_report_is_of_the_ema_in_the_training_precision(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "HELD_OUT", 6)  # a batch of four and one of two
    log, _ = trained(tmp_path / "a", "--precision", "bf16", "--batch-size", 4, "--steps", 3)

    vae, x = LiteVAE.from_checkpoint(tmp_path / "a" / "checkpoint.pt"), held_out_images(6)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        out = vae(x, sample=False)
    picture = torch.from_numpy(np.array(Image.open(tmp_path / "a" / "reconstructions-000003.png"))).permute(2, 0, 1)

    assert float(log[-1]["psnr"]) == pytest.approx(train.psnr(out.sample, x).mean().item(), abs=2e-3)
    assert vae.config.scaling_factor == pytest.approx(1 / out.latent.std().item(), rel=1e-3)
    assert picture.shape == (3, 2 * 130 - 2, 8 * 130 - 2) and (picture[:, 130:, 4 * 130 - 2:] == 255).all()
    for i, image in enumerate(image for pair in zip(x, out.sample) for image in pair):
        tile = picture[:, i // 8 * 130:, i % 8 * 130:][:, :128:8, :128:8] / 127.5 - 1  # enlarged, no pixel blended
        assert (tile - image.clamp(-1, 1)).abs().max() < 0.02


def test_each_network_takes_its_finite_steps_alone(tmp_path, monkeypatch):
    """Step 1 is not finite for the discriminator, step 2 for the autoencoder."""
    def spoil(module, name, bad):
        loss, calls = getattr(module, name), itertools.count()
        monkeypatch.setattr(module, name, lambda *how: loss(*how) * (math.nan if next(calls) == bad else 1))

    spoil(train, "discriminator_loss", 1), spoil(litevae, "l1_loss", 2)
    task, batch = prepared(*GAN, "--disc-start", 0, "--steps", 9, "--out", tmp_path / "a")
    networks = (task.vae, task.ema.model, task.discriminator)
    moved = []
    for step in range(4):
        before = copy.deepcopy([list(network.parameters()) for network in networks])
        _, finite = task.step(batch, step, True)
        moved.append((*[not all(map(torch.equal, a, b.parameters())) for a, b in zip(before, networks)], finite))

    assert moved == [(True, True, True, True), (True, True, False, False), (False, False, True, False),
                     (True, True, True, True)]


def test_a_second_stage_takes_weights_discriminator_and_shape(finished_run, tmp_path):
    first = checkpoint_of(finished_run)
    start = ["--init", finished_run / "checkpoint.pt", "--steps", 400, "--out", tmp_path / "b"]
    save_checkpoint(tmp_path / "v.pt", small_variant(extractor="nafnet", shared_extractor=True))

    second, wider = [prepared(*start, "--discriminator", "unet", "--disc-channels", n)[0] for n in (8, 16)]
    args, _ = train.parse_args(["--out", "/none", "--init", str(tmp_path / "v.pt")])

    assert_same_weights(second.vae.state_dict(), first["ema"])
    assert_same_weights(second.ema.model.state_dict(), first["ema"])
    assert_same_weights(second.discriminator.state_dict(), first["training"]["discriminator"])
    # Another one has to be trained first: until a quarter of the steps.
    assert [(task.args.disc_start, task.args.disc_warmup) for task in (second, wider)] == [(0, 0), (100, 10)]
    assert (args.extractor, args.shared_extractor, args.latent_dim) == ("nafnet", True, 4)


SCRIPTS = {"train.py": train, "sample_ldm.py": sample_ldm, "eval.py": evaluation}
REFUSED = [  # a command, and words of its one sentence
    ("train.py --resolution 20", "--resolution: must be a multiple of 8"), ("train.py --stepz 5", "--stepz"),
    ("train.py --weight-kl nan", "0 or above"), ("train.py --beta1 1", "below 1"), ("train.py --lr 0", "--lr"),
    (f"train.py --seed {2**32 - 1}", "whole number from 0"), ("train.py --data ", "--data: must be the name"),
    ("train.py --disc-start 9", "does nothing with --discriminator none"),
    ("train.py --shared-extractor --model sd-vae", "does nothing with --model sd-vae"),
    ("train.py --discriminator unet --disc-start 50 --steps 50", "beyond the last"),
    ("train.py --discriminator patchgan --disc-start 1 --resolution 16", "at least 24"),
    ("train.py --discriminator stylegan --disc-start 1 --batch-size 6", "multiple of 4"),
    ("train.py --device cuda:99", "--device"), ("train.py --data {tmp}/empty", "no images"),
    ("train.py --data {tmp}/two", "go without it: --perceptual none"),
    ("train.py --init {tmp}/vit.pt", "it needs --resolution 16"),
    ("train.py --init {tmp}/vit.pt --extractor nafnet", "--extractor unet, not one with --extractor nafnet"),
    ("train.py --resume --out {done} --decoder-channels 32 --steps 9", "--decoder-channels 8, not 32"),
    ("train.py --out {done}", "--resume"), ("train.py --resume --out {done}", "raise --steps"),
    ("train.py --resume --out {folder}", "no training state"), ("train.py --resume --out {tmp}", "no checkpoint at"),
    ("sample_ldm.py train --vae {tmp}/vit.pt --resolution 32", "it needs --resolution 16"),
    ("sample_ldm.py train --vae {vae} --class-cond --data {tmp}/two", "two or more"),
    ("sample_ldm.py train --vae {vae} --class-cond --data {classes} --val {tmp}/two", "in no folder"),
    ("sample_ldm.py sample --ldm {vae}", "its format is litevae-2"),
    ("sample_ldm.py sample --ldm {ldm} --class cow", "cat, dog"),
    ("eval.py fid {tmp}/one {tmp}/two --inception random", "at least 2"), ("eval.py fid {tmp}/two", "two folders"),
    ("eval.py recon --vae {vae} --lpips-net none", "--no-fid"),
    ("eval.py mmd --vae {vae} --data {tmp}/two --resolution 32", "at least 4"),
    ("eval.py mmd --vae {tmp}/vit.pt", "16x16 alone"),
    ("eval.py recon --vae {tmp}/nan.pt --no-fid --lpips-net none", "not finite"),
    ("eval.py recon --vae {vae} --no-fid --resolution 32 16", "at least 32"),
    ("eval.py recon --vae {vae} {vae} --out {tmp}/x.png", "leave it out")]


@pytest.mark.parametrize("command, words", REFUSED)
def test_what_cannot_be_done_is_refused_in_one_sentence(
        command, words, wrong_files, finished_run, class_folder, vae_file, ldm_file, tmp_path, offline, capsys):
    name, *options = command.split(" ")
    paths = {"tmp": wrong_files, "done": finished_run, "classes": class_folder, "vae": vae_file, "ldm": ldm_file,
             "folder": vae_file.parent}
    options = [o.format(**paths) for o in options] + (["--device", "cpu"] if "--device" not in options else [])
    if name != "eval.py" and "--out" not in options:
        options += ["--out", tmp_path / "new"]

    assert run(SCRIPTS[name], *options) == 1

    error = re.sub(r"^Downloading: .*\n", "", capsys.readouterr().err)  # torch's own line, up to 2.6
    assert words in error and error.startswith(f"{name}: ") and error.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_ctrl_c_outside_the_loop_leaves_no_traceback(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "prepare", mock.Mock(side_effect=KeyboardInterrupt))

    assert run(train, *TINY[train], "--out", tmp_path / "a") == 130

    assert capsys.readouterr().err == "train.py: stopped\n"


def test_every_option_has_a_value_in_both_recipes_and_states_it(folder):
    commands = next(a for a in sample_ldm.build_parser()._actions if a.dest == "command").choices

    quick, paper = [vars(train.parse_args(["--out", "/none", *more])[0]) for more in ([], ["--data", str(folder)])]

    for parser, recipes, words in (
            (train.build_parser(), (train.QUICK_START, train.PAPER), "default: S, with --data B"),
            (commands["train"], (sample_ldm.QUICK_START, sample_ldm.DATA), "default: quick,")):
        options = {action.dest for action in parser._actions} - {"help", "out"}
        assert options == recipes[0].keys() == recipes[1].keys()
        assert words in " ".join(parser.format_help().split())
    appendix_f = {"batch_size": 16, "steps": 200_000, "lr": 1e-4, "beta1": 0.5, "beta2": 0.9, "size": "B"}
    measured_with = {"steps": 1490, "lr": 3e-3, "weight_mse": 10, "weight_wavelet": 0.1, "weight_kl": 3e-4, "ema": 0.99}
    assert appendix_f.items() <= paper.items() and measured_with.items() <= quick.items()


def torchrun(script, *args, status=0):
    """A script run by two processes with gloo; what they print."""
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                           str(script), *map(str, args)], capture_output=True, text=True, timeout=200,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)})
    assert done.returncode == status, done.stderr[-2000:]
    return done.stdout


STOPPED = """
import os, signal, sys, train
rate = train.learning_rate

def learning_rate(step, args):
    if step == 3 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
    return rate(step, args)

train.learning_rate = learning_rate
sys.exit(train.run_script(train.main))
"""


def test_two_processes_stop_together_and_follow_the_curve_of_one(tmp_path):
    """Two processes, of which one gets a signal, against one process with the same global batch."""
    options = [*GAN, "--batch-size", "4", "--steps", "8", "--adaptive-weight", "--grad-ratio"]
    (tmp_path / "stopped.py").write_text(STOPPED)

    told = torchrun(tmp_path / "stopped.py", *TINY[train], *options, "--out", tmp_path / "two", status=1)
    stopped = checkpoint_of(tmp_path / "two")["step"]
    torchrun(HERE / "train.py", "--resume", "--out", tmp_path / "two")
    one, two = trained(tmp_path / "one", *options)[0], rows(tmp_path / "two")

    assert stopped == 4 and told.count("stopped after step 4 of 8") == 1
    assert [r["step"] for r in two] == [str(i) for i in range(1, 9)]  # one writer
    for name in ("step", "loss", "l1", "wavelet", "kl", "adv", "d_loss", "adv_weight", "grad_ratio", "grad_norm"):
        a, b = [[float(row[name] or "nan") for row in log] for log in (one, two)]
        assert b == pytest.approx(a, rel=2e-3, abs=1e-4, nan_ok=True), name


def test_a_step_brings_numbers_from_the_device_once(tmp_path, monkeypatch):
    """A GPU has to be waited for by what makes numbers of its tensors."""
    task, batch = prepared("--adaptive-weight", "--weight-ldl", 1, "--discriminator", "stylegan", *DISC,
                           "--batch-size", 4, "--steps", 9, "--out", tmp_path)
    calls = []

    def note(name):
        method = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda *how, **more: calls.append(name) or method(*how, **more))

    for name in ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__format__", "__array__"):
        note(name)
    task.step(batch, 1, True)

    assert calls == ["tolist"]  # all gradient norms are read together


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="lists processes as Linux does")
@pytest.mark.parametrize("end, workers, status, words", [
    (lambda data, group, loader: shutil.rmtree(data), 8, 1, "images can be read"),
    (lambda data, group, loader: os.kill(loader, signal.SIGKILL), 2, 1, "lower --batch-size"),
    (lambda data, group, loader: os.killpg(group, signal.SIGTERM), 2, 128 + signal.SIGTERM, "stopped after step")],
    ids=["folder", "loader", "group"])  # Slurm and `timeout` end the whole group
def test_a_run_outlives_nohup_and_saves_whatever_ends_it(end, workers, status, words, folder, tmp_path):
    out, data = tmp_path / "run", shutil.copytree(folder, tmp_path / "data")
    options = [*TINY[train], "--workers", workers, "--data", data, "--perceptual", "none", "--discriminator", "none",
               "--steps", 100000, "--out", out]
    process = subprocess.Popen([sys.executable, str(HERE / "train.py"), *map(str, options)], text=True,
                               start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))

    def wait_for(steps):
        while not (out / "log.csv").exists() or len(rows(out)) < steps:
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.1)

    wait_for(3)
    os.killpg(process.pid, signal.SIGHUP)
    wait_for(len(rows(out)) + 3)
    loaders = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    end(data, process.pid, int(loaders[-1]))

    assert words in process.communicate(timeout=60)[0].splitlines()[-1] and process.returncode == status
    assert load_checkpoint(out / "checkpoint.pt")["step"] == int(rows(out)[-1]["step"])
    assert len(loaders) == workers and not any(Path(f"/proc/{loader}").exists() for loader in loaders)


# --- train.py: what the paper compares with -----------------------------------------------------------


@pytest.mark.parametrize("options, name, expected", [
    (["--model", "sd-vae", "--perceptual", "esrgan"], "SD-VAE", {"perceptual": litevae.ESRGANPerceptual}),
    (["--model", "vae-small"], "VAE-Small", {}), (["--model", "dwt-2"], "DWT-2", {}),
    (["--extractor", "nafnet", "--size", "S"], "LiteVAE-S (NAFNet extractor)", {"discriminator": type(None)}),
    (["--aggregator", "vit", "--discriminator", "stylegan", "--adv-loss", "logistic", "--batch-size", 4, *DISC],
     "LiteVAE-S (ViT aggregator)", {"discriminator": litevae.StyleGANDiscriminator, "g_loss": "logistic_g_loss",
                                    "d_loss": "logistic_d_loss"}),
    (["--last-two-levels", "--size", "B"], "LiteVAE-B (last two levels)", {"perceptual": type(None)}),
    (["--shared-extractor", "--discriminator", "patchgan", "--resolution", 24, *DISC], "LiteVAE-S (shared extractor)", {
        "discriminator": litevae.PatchDiscriminator, "g_loss": "hinge_g_loss", "d_loss": "hinge_d_loss"})])
def test_options_choose_what_they_name_and_a_checkpoint_keeps_it(options, name, expected, tmp_path, vgg, narrow):
    task, batch = prepared(*options, "--steps", 9, "--out", tmp_path)
    _, finite = task.step(batch, 1, True)
    task.save(1)

    vae = LiteVAE.from_checkpoint(tmp_path / "checkpoint.pt")
    chosen = {key: getattr(getattr(task, key), "__name__", type(getattr(task, key))) for key in expected}
    assert finite and vae.name == name and chosen == expected
    assert task.discriminator is None or len(next(task.discriminator.parameters())) == 8  # its width
    assert_same_weights(vae.state_dict(), task.ema.model.state_dict())


def test_ldl_the_adaptive_weight_and_the_ratio_by_hand(tmp_path):
    weights = {"weight_kl": 0.2, "weight_mse": 0.0, "weight_wavelet": 0.3, "weight_ldl": 0.7}
    task, batch = prepared(*typed(weights), "--discriminator", "unet", "--disc-channels", 8, "--disc-start", 1,
                           "--disc-warmup", 2, "--adaptive-weight", "--grad-ratio", "--steps", 9, "--out", tmp_path)
    task.ema.model.decoder.conv_out.gain.mul_(0.5)  # nearer to the images than an untrained reconstruction
    image = task.machine.images(batch[0])
    torch.manual_seed(7)
    noise = task.machine.randn((2, 12, 2, 2))
    x_hat, x_ema = [model(image, noise=noise).sample for model in (task.vae, task.ema.model)]
    ldl = litevae.ldl_loss(x_hat, image, x_ema).item()

    torch.manual_seed(7)
    values = {name: torch.as_tensor(value).item() for name, value in task.step(batch, 1, True)[0].items()}

    assert values["ldl"] == pytest.approx(ldl, rel=1e-3) and ldl > 1e-4
    recon = values["l1"] + 0.3 * values["wavelet"] + 0.7 * values["ldl"]
    assert values["recon"] == pytest.approx(recon, rel=1e-5)
    # Weighted, the adversarial gradient is half of the other, here times a ramp of a half; the ratio is unweighted.
    assert values["adv_weight"] * values["grad_ratio"] == pytest.approx(0.5 * 0.5, rel=5e-3)
    total = values["recon"] + 0.2 * values["kl"] + values["adv_weight"] * values["adv"]
    assert values["loss"] == pytest.approx(total, rel=1e-4)


# --- sample_ldm.py: diffusion and its samplers --------------------------------------------------------


def test_the_schedule_is_edms():
    sigmas = sample_ldm.sigma_schedule(18)

    for i in range(18):  # EDM Eq. 5, from 80 to 0.002 at a std of the data of 0.5, twice that at 1
        assert sigmas[i] == pytest.approx(2 * (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7)
    assert len(sigmas) == 19 and sigmas[18] == 0 and sample_ldm.sigma_schedule(1) == [pytest.approx(160), 0.0]


@pytest.mark.parametrize("options", [(3.0, 0.02, 10.0, 1.1), ()], ids=["below the cap", "the defaults"])
def test_stochastic_sampler_equals_algorithm_2_as_a_loop(options):
    S_churn, S_tmin, S_tmax, S_noise = options or (40.0, 0.1, 100.0, 1.003)  # EDM's for ImageNet, at std 1
    N, sigmas, noise = 12, sample_ldm.sigma_schedule(12), torch.randn(12, 6, 2, dtype=torch.float64)
    D = lambda x, sigma: torch.tanh(x) / (1 + sigma[0])  # noqa: E731
    start = sigmas[0] * torch.randn(6, 2, dtype=torch.float64)

    randn = iter(noise)
    out = sample_ldm.stochastic_sampler(D, start, sigmas, lambda: next(randn), *options)

    x, randn = start, iter(noise)
    for i in range(N):  # EDM, Algorithm 2, line by line
        t, t_next = sigmas[i], sigmas[i + 1]
        gamma = min(S_churn / N, math.sqrt(2) - 1) if S_tmin <= t <= S_tmax else 0
        t_hat = t + gamma * t
        x_hat = x + math.sqrt(t_hat**2 - t**2) * S_noise * next(randn) if gamma else x
        d = (x_hat - D(x_hat, [t_hat])) / t_hat
        x = x_hat + (t_next - t_hat) * d
        if t_next != 0:
            x = x_hat + (t_next - t_hat) * (d + (x - D(x, [t_next])) / t_next) / 2
    assert (out - x).abs().max() < 1e-12


# --- sample_ldm.py: network and latents ---------------------------------------------------------------


def parameters_in_turn(unet, *inputs):
    """The weights, then the biases, of a network's layers in the order in which it uses the layers."""
    used = []
    for module in unet.modules():
        if hasattr(module, "weight"):
            module.register_forward_hook(lambda module, *how: used.append(module))
    unet(*inputs)
    return [layer.weight for layer in used] + [layer.bias for layer in used if hasattr(layer, "bias")]


@pytest.mark.parametrize("scale_shift", [False, True], ids=["LDM's", "ADM's"])
@torch.no_grad()
def test_unet_equals_diffusers_with_the_same_weights(scale_shift):
    ours = randomise(sample_ldm.UNet(4, 32, (1, 2, 3), 2, (1, 2), scale_shift, classes=2), 0.05)
    theirs = diffusers.UNet2DModel(
        sample_size=16, in_channels=4, out_channels=4, layers_per_block=2, block_out_channels=(32, 64, 96),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"), attention_head_dim=32, norm_eps=1e-6,
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"), attn_norm_num_groups=32, num_class_embeds=3,
        resnet_time_scale_shift="scale_shift" if scale_shift else "default").eval()
    x, c_noise = torch.randn(2, 4, 16, 16), torch.tensor([-1.2, 0.7])
    label, none = torch.tensor([[1, 0], [2, 2]])
    weights = nn.utils.parameters_to_vector(parameters_in_turn(ours, x, c_noise, label))
    # Their layers for queries, keys and values hold, one after another, what our one layer holds.
    nn.utils.vector_to_parameters(weights, parameters_in_turn(theirs, x, c_noise, label))

    found = [ours(x, c_noise, label), ours(x, c_noise, None)]

    expected = [theirs(x, 100 * c_noise, known_as).sample for known_as in (label, none)]
    assert len(weights) == count(ours) == count(theirs)
    assert torch.allclose(torch.stack(found), torch.stack(expected), atol=2e-5)


def test_presets_have_the_papers_and_the_stated_parameters():
    with torch.device("meta"):
        sizes = {name: count(sample_ldm.UNet(12 if name == "quick" else 4, **preset))
                 for name, preset in sample_ldm.PRESETS.items()}

    assert sizes == {"quick": 720_828, "small": 45_214_980, "ldm": 274_060_196}  # LDM's Table 12: 274 M


def test_diffusion_sections_run_when_copied_out():
    text = Path(sample_ldm.__file__).read_text()
    space = {"math": math, "functools": functools, "torch": torch, "nn": nn, "F": F}
    parts = litevae.group_norm, litevae.GroupNorm, litevae.upsample, litevae.autocast_off, litevae.Config
    exec("\n".join(map(inspect.getsource, parts)), space)
    exec(text[text.index("# --- 1  Diffusion"):text.index("# --- 4  The step")], space)
    denoiser, noise = space["Denoiser"](space["UNet"](4, 32, (1, 2), 1, (1,), classes=2)), torch.randn(2, 4, 5, 7)

    out = space["heun_sampler"](space["guided"](denoiser, torch.tensor([0, 1]), 2.0), noise, [1.0, 0.0])

    assert torch.allclose(out, noise / 2)  # c_skip at sigma 1, for the network starts at zero


def test_cached_latents_are_those_of_images_and_flipped_ones(folder, vae_file):
    machine, vae, files = train.Machine("cpu", "fp32"), LiteVAE.from_checkpoint(vae_file), readable(folder)
    images = train.ImageFolder(files, 16, seed=3, labels=[3, 1, 4, 1, 5, 9])
    args = argparse.Namespace(data=folder, resolution=16, batch_size=4, workers=0, seed=3)
    x = machine.images(torch.stack([load_square(file, 16) for file in files]))
    views = torch.cat([torch.stack(sample_ldm.encode(vae, view), dim=1) for view in (x, x.flip(-1))])

    cached = sample_ldm.CachedLatents(images, vae, args, machine)

    found = []
    for moments, label in (cached[position] for position in range(60)):
        distance = (views - moments.float()).abs().amax((1, 2, 3, 4))
        found.append(int(distance.argmin()))
        assert distance.min() < 2e-3 and label == images.labels[found[-1] % 6]
    epochs = [tuple(view % 6 for view in found[first:first + 6]) for first in range(0, 60, 6)]
    assert all(sorted(epoch) == [0, 1, 2, 3, 4, 5] for epoch in epochs)
    assert len(set(epochs)) > 8 and len(set(found)) > 10  # shuffled anew, and images do not keep one flip for ever


# --- sample_ldm.py: whole runs ------------------------------------------------------------------------


def test_a_diffusion_run_equals_edm_written_out(tmp_path, vae_file, class_folder, tiny_ldm, monkeypatch):
    """Six steps on the latents of two classes in which every option has an unusual value."""
    monkeypatch.setattr(train, "HELD_OUT", 6)  # a batch of four and one of two
    monkeypatch.setattr(sample_ldm, "draw", mock.Mock(wraps=sample_ldm.draw))
    options = UNUSUAL | {"noise_mean": 0.7, "noise_std": 0.4, "class_dropout": 0.3}

    log, checkpoint = trained(tmp_path / "a", *typed(options), "--data", class_folder, "--val", class_folder,
                              "--class-cond", script=sample_ldm)

    files = train.find_images(class_folder)
    labels = [int("red" in file.split(os.sep)) for file in files]
    images = train.ImageFolder(files, 16, seed=3, labels=labels)
    torch.manual_seed(3)
    vae, factor = LiteVAE.from_checkpoint(vae_file), 0.5  # that of the file
    denoiser = sample_ldm.Denoiser(sample_ldm.UNet(4, **sample_ldm.PRESETS["quick"], classes=2)).train()
    start, ema = copy.deepcopy(denoiser.state_dict()), copy.deepcopy(denoiser)
    adam = torch.optim.Adam(denoiser.parameters(), betas=(0.3, 0.7))
    for step, row in enumerate(log):
        x, label = zip(*(images[4 * step + i] for i in range(4)))
        with torch.no_grad():
            q = vae.encode(torch.stack(x) / 127.5 - 1).latent_dist
        torch.manual_seed(3 * 1_000_003 + step)
        z = (q.mean + q.std * torch.randn(4, 4, 2, 2)) * factor
        label = torch.where(torch.special.ndtr(torch.randn(4)) < 0.3, 2, torch.tensor(label))
        sigma, noise = torch.exp(0.7 + 0.4 * torch.randn(4)).view(-1, 1, 1, 1), torch.randn(4, 4, 2, 2)
        c_skip, c_out = 1 / (sigma**2 + 1), sigma / (sigma**2 + 1).sqrt()
        y = z + sigma * noise
        D = c_skip * y + c_out * denoiser.net(y / (sigma**2 + 1).sqrt(), sigma.flatten().log() / 4, label)
        loss = ((D - z).square() / c_out**2).mean()
        norm = written_out(loss, denoiser, adam, step)
        follow(ema, denoiser, step)
        assert float(row["loss"]) == pytest.approx(loss.item(), rel=2e-3), step
        assert float(row["grad_norm"]) == pytest.approx(norm.item(), rel=1e-2), step
        assert float(row["lr"]) == pytest.approx(adam.param_groups[0]["lr"], rel=1e-4)
    last = "net.conv_out"  # gradients of deeper layers begin at 0, where Adam magnifies rounding
    assert gap(checkpoint["model"], denoiser, start, last) < 1e-3 and gap(checkpoint["ema"], ema, start, last) < 1e-3
    assert_same_weights(checkpoint["vae"]["model"], load_checkpoint(vae_file)["ema"])

    # The report: EMA weights, scaled means, one noise level for each of six held-out images of both classes.
    x = torch.stack([load_square(file, 16) for file in files[::2]]) / 127.5 - 1
    sigma = torch.exp(0.7 + 0.4 * torch.special.ndtri((torch.arange(6) + 0.5) / 6))
    noise = sample_ldm.ImageNoise(0, range(6))((4, 2, 2))
    with torch.no_grad():
        z = vae.encode(x).latent_dist.mean * factor
        loss = sample_ldm.diffusion_loss(ema.eval(), z, sigma, noise, torch.tensor(labels[::2]))
    assert float(log[-1]["val_loss"]) == pytest.approx(loss.item(), rel=1e-4)
    shown, *_, label = sample_ldm.draw.call_args.args
    assert_same_weights(shown.state_dict(), checkpoint["ema"])
    assert label.tolist() == 8 * [0, 1]


def pixels(folder):
    return [np.asarray(Image.open(path)).astype(int) for path in sorted(Path(folder).glob("*.png"))]


def draw_samples(ldm_file, out, *options):
    fixed = ["--ldm", ldm_file, "--out", out, "--device", "cpu", "--precision", "fp32", "--steps", 3]
    assert run(sample_ldm, "sample", *fixed, *options) == 0
    return pixels(out / "images")


def near(a, b, most=1):
    """Whether two lists of pictures are as long, and differ by rounding at most."""
    return len(a) == len(b) and all(np.abs(x - y).max() <= most for x, y in zip(a, b))


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
SAMPLED = {  # options, and what they mean: classes, seed, guidance, churn
    "Heun": ("-n 3 --guidance 3 --churn 0 --precision bf16", [0, 1, 0], 0, 3.0, 0.0),
    "stochastic": ("-n 5 --class dog cat --seed 7 --churn 30 --batch-size 3", [1, 0, 1, 0, 1], 7, 2.0, 30.0)}


@pytest.mark.parametrize("case, device", [("Heun", "cpu"), ("stochastic", "cpu"),
                                          pytest.param("stochastic", "cuda", marks=needs_cuda)])
def test_samples_are_what_the_sampler_makes_of_the_noise(case, device, ldm_file, tmp_path, exact):
    options, label, seed, guidance, churn = SAMPLED[case]
    (denoiser, vae), n = sample_ldm.build(load_checkpoint(ldm_file, sample_ldm.LDM_FORMAT)), len(label)
    sigmas, noise, label = sample_ldm.sigma_schedule(3), sample_ldm.ImageNoise(seed, range(n)), torch.tensor(label)

    found = draw_samples(ldm_file, tmp_path / "a", "--device", device, *options.split())

    def denoise(x, sigma):  # classifier-free guidance; label 2 is none
        without = denoiser(x, sigma, torch.full((n,), 2))
        return without + guidance * (denoiser(x, sigma, label) - without)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled="bf16" in options):
        randn = lambda: noise((4, 4, 4))  # noqa: E731
        x = sample_ldm.stochastic_sampler(denoise, sigmas[0] * randn(), sigmas, randn, churn)
        images = train.to_pixels(vae.decode(x / 0.5).sample) * 255
    assert near(found, list(images.permute(0, 2, 3, 1).numpy()), most=1 if device == "cpu" else 3)
    grid = np.asarray(Image.open(tmp_path / "a" / "grid.png"))  # each pixel four times as large
    assert grid.shape[1] == n * 130 - 2 and (grid[::4, :128:4] == found[0]).all()
    assert_same_weights(denoiser.state_dict(), torch.load(ldm_file)["ema"])


def test_samples_that_are_not_finite_are_not_written(ldm_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sample_ldm, "decode", lambda vae, x: torch.full((len(x), 3, 32, 32), math.inf))

    assert run(sample_ldm, "sample", "--ldm", ldm_file, "-n", 2, "--steps", 2, "--out", tmp_path) == 1

    assert "not finite" in capsys.readouterr().err and pixels(tmp_path / "images") == []


def test_two_processes_train_and_sample_what_one_does(tmp_path, class_folder, vae_file, monkeypatch):
    """Two processes against one with the same global batch."""
    monkeypatch.setattr(train, "HELD_OUT", 64)  # as the other processes have it
    options = [*TINY[sample_ldm], "--vae", vae_file, "--data", class_folder, "--model", "quick", "--cache-latents"]
    options += ["--steps", 3]
    ldm = tmp_path / "one" / "checkpoint.pt"

    assert run(sample_ldm, *options, "--out", tmp_path / "one") == 0
    torchrun(HERE / "sample_ldm.py", *options, "--out", tmp_path / "two")
    torchrun(HERE / "sample_ldm.py", "sample", "--ldm", ldm, "-n", 5, "--batch-size", 2, "--steps", 3,
             "--device", "cpu", "--precision", "fp32", "--out", tmp_path / "s2")

    for one, two in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        assert [float(two[name] or 0) for name in ("loss", "val_loss")] == pytest.approx(
            [float(one[name] or 0) for name in ("loss", "val_loss")], rel=1e-3)
    assert near(draw_samples(ldm, tmp_path / "s1", "-n", 5), pixels(tmp_path / "s2" / "images"))
    assert near(pixels(tmp_path / "s1"), pixels(tmp_path / "s2"))  # the grid


# --- eval.py: the metrics -----------------------------------------------------------------------------


def skimage_ssim(a, b):
    return skimage.metrics.structural_similarity(a, b, data_range=1, channel_axis=0, gaussian_weights=True, sigma=1.5,
                                                 use_sample_covariance=False)


def test_ssim_equals_scikit_image():
    x = held_out_images(3, 48)[..., :40]
    y = 1.2 * x + 0.3 * torch.randn_like(x) * torch.tensor([0.1, 1.0, 3.0]).view(3, 1, 1, 1)  # leaves [-1, 1]

    found = evaluation.ssim(y, x)

    a, b = [((v.double() + 1) / 2).clamp(0, 1).numpy() for v in (x, y)]
    assert found.tolist() == pytest.approx([skimage_ssim(*pair) for pair in zip(a, b)], abs=1e-6)


def test_inception_equals_pytorch_fid(inception_file, monkeypatch):
    weights, published = torch.load(inception_file, weights_only=True), mock.Mock()
    published.return_value.hexdigest.return_value = "6726825d0af5f729"
    monkeypatch.setattr(evaluation.hashlib, "sha256", published)
    monkeypatch.setattr(pytorch_fid.inception, "load_state_dict_from_url", lambda *args, **kwargs: weights)
    inception, theirs = evaluation.load_inception(inception_file), pytorch_fid.inception.InceptionV3([3]).eval()
    x = torch.rand(2, 3, 330, 48)  # one side shrinks, the other grows

    with torch.no_grad():
        ours, expected = inception(x), theirs(x)[0].flatten(1)

    assert inception.label == "published weights"
    assert (ours - expected).abs().max() < 1e-4 * expected.abs().max()
    assert expected.std(dim=0).mean() > 1e-3 * expected.mean()  # the comparison is not one of constants


@pytest.mark.parametrize("ranks", [(128, 128), (20, 30)])
def test_frechet_distance_equals_scipys_sqrtm(ranks):
    m1, m2, rng = np.zeros(64), np.full(64, 0.1), np.random.default_rng(0)
    s1, s2 = [np.cov(rng.standard_normal((rank + 1, 64)).T / np.arange(1, 65)[:, None] ** 0.5) for rank in ranks]

    found = evaluation.frechet_distance(m1, s1, m2, s2)

    expected = ((m1 - m2) ** 2).sum() + np.trace(s1 + s2) - 2 * np.trace(np.real(scipy.linalg.sqrtm(s1 @ s2)))
    assert found == pytest.approx(expected, rel=1e-6)


def test_mmd_equals_a_double_loop():
    x, y = torch.randn(5, 3).double(), torch.randn(7, 3).double() + 0.5

    for sigma, ours in zip((0.5, 2.0), evaluation.mmd2(x, y, (0.5, 2.0))):
        k = lambda a, b: math.exp(-(a - b).square().sum() / (2 * sigma**2))  # noqa: E731, B023
        xx, yy = [np.mean([k(*pair) for pair in itertools.permutations(points, 2)]) for points in (x, y)]
        xy = np.mean([k(*pair) for pair in itertools.product(x, y)])
        assert ours == pytest.approx(xx + yy - 2 * xy, rel=1e-9)


def test_macs_are_those_of_the_reading_of_the_paper():
    counts = {name: evaluation.count_macs(build, 256) / 1e9 for name, build in evaluation.ENCODERS.items()}

    assert counts == {"SD-VAE": pytest.approx(136.4, abs=0.05), "LiteVAE-S": pytest.approx(5.76, abs=0.005),
                      "LiteVAE-B": pytest.approx(37.8, abs=0.05), "LiteVAE-M": pytest.approx(224, abs=0.5),
                      "LiteVAE-L": pytest.approx(233, abs=0.5)}


@needs_cuda
def test_peak_memory_on_cuda_counts_what_is_held_at_once():
    x, network = torch.zeros(1, 3, 100, 100, device="cuda"), nn.Module()
    network.p = nn.Parameter(torch.zeros(1000))
    network.forward = lambda x: x + 1 + 1 + 1  # two of the three sums at once

    with torch.no_grad():
        found = evaluation.peak_memory(network, x)

    assert found == pytest.approx(4 * (1000 + 30_000 + 2 * 30_000), abs=2000)  # allocated in blocks of 512 bytes


def test_throughput_is_measured_in_turns(monkeypatch):
    calls, seconds = [], {"slow": 0.25, "fast": 0.125}
    clock = argparse.Namespace(perf_counter=lambda: sum(seconds[name] for name in calls))
    monkeypatch.setattr(evaluation, "time", clock)
    encoders = {name: lambda x, name=name: calls.append(name) for name in seconds}

    values = evaluation.throughput(encoders, torch.zeros(4, 1), rounds=2)

    assert values == {"slow": [16, 16], "fast": [32, 32]}
    assert calls == 2 * (3 * ["slow"] + 5 * ["fast"])  # half a second each, after a pass that does not count


# --- eval.py: the commands ----------------------------------------------------------------------------


OTHERWISE = "--sample --resize bilinear --lpips-net squeeze"


@pytest.mark.parametrize("how, device", [("", "cpu"), (OTHERWISE, "cpu"),
                                         pytest.param(OTHERWISE, "cuda", marks=needs_cuda)])
def test_recon_equals_the_metrics_of_libraries(how, device, folder, inception, inception_file, tmp_path, capsys, vgg):
    vae = randomise(small_vae(), 0.02).eval()
    nn.init.constant_(vae.decoder.conv_out.bias, 0.8)  # brighter than images can be
    save_checkpoint(tmp_path / "c.pt", small_vae(), vae, args={"resolution": 32})

    result = measured(tmp_path, "recon", "--vae", tmp_path / "c.pt", "--data", folder, "--batch-size", 4, "--limit", 7,
                      "--inception", inception_file, "--out", tmp_path / "r.png", *how.split(), device=device)

    images = evaluation.Images(readable(folder)[:5], 32, resize="bilinear" if how else "bicubic")
    images, generator = torch.stack([images[i] for i in range(5)]), torch.Generator().manual_seed(0)
    x, noise = images / 127.5 - 1, torch.stack([torch.randn(4, 4, 4, generator=generator) for _ in range(5)])
    real, fake = evaluation.FeatureStatistics(), evaluation.FeatureStatistics()
    with torch.no_grad():
        q = vae.encode(x).latent_dist
        y = vae.decode(q.mean + q.std * noise if how else q.mean).sample.clamp(-1, 1)
        real.update(inception(images / 255)), fake.update(inception(((y + 1) * 127.5).round() / 255))
    a, b = [((v.double() + 1) / 2).numpy() for v in (x, y)]
    psnr = [skimage.metrics.peak_signal_noise_ratio(*pair, data_range=1) for pair in zip(a, b)]
    ssim = [skimage_ssim(*pair) for pair in zip(a, b)]
    lpips = LPIPS("squeeze" if how else "vgg")(y, x).tolist()
    rel = 1e-4 if device == "cpu" else 1e-3
    for name, values in {"psnr": psnr, "ssim": ssim, "lpips": lpips}.items():
        assert result[name] == pytest.approx(np.mean(values), rel=rel), name
    assert result["psnrs"] == pytest.approx(psnr, rel=rel) and result["n"] == 5
    assert result["rfid"] == pytest.approx(evaluation.fid(real, fake), rel=10 * rel)
    out, picture = capsys.readouterr().out, np.asarray(Image.open(tmp_path / "r.png")).astype(float)
    assert "broken.jpg" in out and "empty.png" in out and "fewer than its 2048" in out
    x, y, difference = [picture[:128, 130 * i:130 * i + 128] for i in range(3)]
    assert (x[::4, ::4] == images[0].permute(1, 2, 0).numpy()).all()
    assert np.abs(difference - (127.5 + 2 * (y - x)).clip(0, 255)).max() <= 3


def test_statistics_of_other_features_are_refused(tmp_path):
    np.savez(tmp_path / "s.npz", mu=np.zeros(2048), sigma=np.eye(2048))  # pytorch-fid's: of the published weights

    statistics = evaluation.load_statistics(tmp_path / "s.npz", "published weights")

    assert statistics.n == 0  # not known
    with pytest.raises(train.UsageError, match="cannot be compared"):
        evaluation.load_statistics(tmp_path / "s.npz", "random features")


@pytest.mark.parametrize("how", ["", "--resolution 32", "--resolution 32 --resize bilinear"])
def test_fid_reads_images_as_told_and_saves_statistics(how, folder, class_folder, tmp_path, inception, monkeypatch):
    seen, features = [], lambda x: x.flatten(1)[:, :2048]
    monkeypatch.setattr(evaluation, "load_inception", lambda source: inception)
    monkeypatch.setattr(inception, "forward", lambda x: seen.append(x) or features(x))

    options = ["--batch-size", 4, *how.split()]
    found = measured(tmp_path, "fid", folder, class_folder, "--save-stats", tmp_path / "a.npz", *options)
    again = measured(tmp_path, "fid", class_folder, tmp_path / "a.npz", *options)

    a, b = torch.cat(seen[:2]), torch.cat(seen[2:5])
    for file, image in zip(readable(folder), a):
        whole = torch.from_numpy(np.array(Image.open(file).convert("RGB"))).permute(2, 0, 1)
        expected = {"": F.interpolate(whole[None] / 255, (299, 299), mode="bilinear")[0],  # each side on its own
                    "--resolution 32": load_square(file, 32) / 255,
                    "--resolution 32 --resize bilinear": evaluation.resize_bilinear(whole, 32) / 255}[how]
        assert torch.allclose(image, expected, atol=1e-6)
    a, b = features(a).double().numpy(), features(b).double().numpy()
    distance = evaluation.frechet_distance(a.mean(0), np.cov(a.T), b.mean(0), np.cov(b.T))
    assert [found["fid"], again["fid"]] == pytest.approx([distance, distance], rel=1e-5)
    assert (found["n"], found["n_a"], found["n_b"]) == (6, 6, 12) and "not the published" in found["inception"]


def test_ldms_resize_is_bilinear_without_antialiasing(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png")

    ours = evaluation.Images([tmp_path / "x.png"], 24, resize="bilinear")[0].permute(1, 2, 0).numpy()

    expected = skimage.transform.resize(pixels / 255, (24, 36), order=1, anti_aliasing=False) * 255
    assert ours.shape == (24, 24, 3) and np.abs(ours - expected[:, 6:30]).max() <= 0.51


def test_recon_measures_each_checkpoint_at_each_resolution(vae_file, folder, tmp_path):
    other = tmp_path / "other.pt"
    save_checkpoint(other, small_vae(latent_dim=6))
    how = ["--data", folder, *NO_METRICS, "--resize", "bilinear"]

    results = measured(tmp_path, "recon", "--vae", vae_file, other, "--resolution", 16, 32, *how)["results"]

    wanted = list(itertools.product((16, 32), (str(vae_file), str(other))))
    assert [(r["resolution"], r["vae"]) for r in results] == wanted
    for result, (resolution, vae) in zip(results, wanted):
        alone = measured(tmp_path, "recon", "--vae", vae, "--resolution", resolution, *how, "--out", tmp_path / "r.png")
        assert result["psnrs"] == pytest.approx(alone["psnrs"], rel=1e-5)


def test_mmd_command_measures_scaled_latents(vae_file, tmp_path):
    found = measured(tmp_path, "mmd", "--vae", vae_file, "--limit", 12, "--resolution", 32, "--batch-size", 5,
                     "--bandwidths", 5, 50, "--sample")["mmd2"]

    vae, noise, generator = LiteVAE.from_checkpoint(vae_file), *[torch.Generator().manual_seed(s) for s in (0, 1)]
    with torch.no_grad():
        q = vae.encode(held_out_images(12, 32)).latent_dist
    noise = torch.stack([torch.randn(4, 4, 4, generator=noise) for _ in range(12)])
    z = (q.mean + q.std * noise).flatten(1) * 0.5
    values = []
    for _ in range(10):
        chosen = z[torch.randperm(12, generator=generator)[:6]]
        values.append(evaluation.mmd2(chosen, torch.randn(6, 64, generator=generator), [5, 50]))
    for sigma, of_sigma in zip(("5", "50"), zip(*values)):
        expected = {"mean": np.mean(of_sigma), "std": np.std(of_sigma, ddof=1)}
        assert found[sigma] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("precision, size", [("fp32", 4), ("bf16", 2)])
def test_cost_measures_every_encoder_and_its_ratios(precision, size, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "ENCODERS", {k: v for k, v in evaluation.ENCODERS.items() if k[-1] in "ES"})
    speeds = {"SD-VAE": [1, 10, 2], "LiteVAE-S": [3, 20, 20]}  # within a round 3, 2 and 10 times as fast
    monkeypatch.setattr(evaluation, "throughput", lambda *how: not torch.is_grad_enabled() and speeds)
    monkeypatch.setattr(evaluation, "peak_memory", lambda encoder, image: count(encoder) * image.element_size())

    found = measured(tmp_path, "cost", "--resolution", 16, "--batch-size", 1, "--precision", precision)["encoders"]

    sd, s = found["SD-VAE"], found["LiteVAE-S"]
    assert (sd["params"], s["params"]) == (34_163_592, 1_038_596)
    assert (sd["images_per_second"], s["images_per_second"], sd["speedup"], s["speedup"]) == (2, 20, 1, 3)
    assert sd["quartiles"] == [1.5, 6] and sd["peak_memory"] == size * sd["params"]  # in that precision
    assert s["memory_ratio"] == pytest.approx(sd["params"] / s["params"])


def test_latents_show_what_they_measure(folder, tmp_path):
    files, vae = readable(folder)[:2], randomise(small_vae(), 0.02).eval()
    save_checkpoint(tmp_path / "c.pt", vae, args={"resolution": 64})
    x = torch.stack([load_square(f, 64) for f in files]) / 127.5 - 1

    numbers = measured(tmp_path, "latents", "--vae", tmp_path / "c.pt", *files)

    z = vae.encode(x).latent_dist.mode().detach().numpy()
    flat = z.swapaxes(0, 1).reshape(4, -1)
    for name, expected in {"mean": flat.mean(1), "std": flat.std(1, ddof=1), "largest": abs(flat).max(1)}.items():
        assert numbers[name] == pytest.approx(expected, rel=1e-3, abs=1e-5)
    picture = np.asarray(Image.open(tmp_path / "latents.png")).transpose(2, 0, 1)
    low, *bands = pywt.wavedec2(x[0].numpy(), "haar", level=3)
    bands = [[4 / 2**level * band for band in of_level] for level, of_level in zip((3, 2, 1), bands)]
    wavelets, _ = pywt.coeffs_to_array([low / 8, *bands], axes=(1, 2))
    assert np.abs(picture[:, :128:2, 130:258:2] - 127.5 * (wavelets.clip(-1, 1) + 1)).max() <= 1
    low, high = np.percentile(flat[:3], (2, 98), axis=1)[..., None, None]
    rgb = 255 * (z[0, :3] - low) / (high - low)
    assert np.abs(picture[:, :128:16, 260:388:16] - rgb.clip(0, 255)).max() <= 1  # squares of 16


def test_features_show_the_strongest_map_first(vae_file, tmp_path):
    vae, seen = LiteVAE.from_checkpoint(vae_file), []
    vae.decoder.norm_out.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].abs()))
    with torch.no_grad():
        vae.decode(vae.encode(held_out_images(2, 32)).latent_dist.mean)

    numbers = measured(tmp_path, "features", "--vae", vae_file, "--out", tmp_path / "f.png")

    (f,) = seen  # (2, 8, 32, 32)
    rms, spots = f.square().mean(dim=(0, 2, 3)).sqrt(), f.amax(dim=(2, 3)) / f.square().mean(dim=(2, 3)).sqrt()
    expected = {"rms": rms, "imbalance": rms.max() / rms.median(), "spots": spots.mean()}
    for name, value in expected.items():
        assert numbers[name] == pytest.approx(value.tolist(), rel=1e-4)
    picture, order = np.asarray(Image.open(tmp_path / "f.png")).astype(float), rms.argsort(descending=True)[:7]
    shown = np.stack([picture[:128:4, 130 * i:130 * i + 128:4, 0] for i in range(1, 8)])
    assert np.abs(shown - 255 * (f[0, order] / f[0, order].max()).numpy()).max() <= 1


def test_features_that_are_not_finite_have_no_fid():
    """It must not come out as 0, the best there is."""
    features = evaluation.FeatureStatistics()
    features.update(torch.full((5, 3), math.nan))

    with pytest.raises(train.UsageError, match="not finite"):
        evaluation.fid(features, features)


# --- The model that comes with the repository ---------------------------------------------------------


def test_the_shipped_model_is_as_good_as_the_readme_says():
    vae, x = LiteVAE.from_checkpoint(train.TRAINED), held_out_images(8, 64)

    out = vae(x, sample=False)

    assert vae.name == "LiteVAE-S" and vae.config.latent_dim == 12 and train.TRAINED.stat().st_size < 5e6
    assert train.psnr(out.sample, x).mean().item() == pytest.approx(25.69, abs=0.2)  # of all 64: 27.32 in the README
    assert (out.latent * vae.config.scaling_factor).std().item() == pytest.approx(1, abs=0.15)  # it is that of 96x96


def test_without_a_checkpoint_the_shipped_model_is_taken(tmp_path, monkeypatch, tiny_ldm):
    before = sorted(train.TRAINED.parent.iterdir())
    monkeypatch.setattr(train, "open_images", mock.Mock(wraps=train.open_images))
    monkeypatch.chdir(tmp_path)

    assert run(evaluation, "recon", *NO_METRICS, "--limit", 2, "--device", "cpu") == 0
    assert run(sample_ldm, "train", "--device", "cpu", "--steps", 1) == 0
    sample = ["sample", "--class", "star", "-n", 2, "--device", "cpu", "--steps", 2]
    assert run(sample_ldm, *sample) == 0 and run(sample_ldm, *sample) == 1  # images are not overwritten

    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"ldm", "recon-builtin-64.png"}
    assert train.open_images.call_args.args[1] is train.Shapes
    checkpoint = checkpoint_of(tmp_path / "runs" / "ldm")
    assert checkpoint["classes"] == list(train.SHAPES) and checkpoint["resolution"] == 64
    assert_same_weights(checkpoint["vae"]["model"], LiteVAE.from_checkpoint(train.TRAINED).state_dict())
    assert len(pixels(tmp_path / "runs" / "ldm" / "samples" / "images")) == 2
    assert sorted(train.TRAINED.parent.iterdir()) == before  # nothing was written there


# --- A GPU's rules, without a GPU ---------------------------------------------------------------------
# Fake tensors have a device, a shape and a dtype, but no numbers. What runs on fake CUDA tensors is refused where CUDA
# would refuse it, reading a number is refused too, and results have the dtypes that CUDA's autocast gives.


class FakeGPU(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the dtypes that group norms and upsampling return, and refuses copies between CPU and GPU."""

    inside = ()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out, name = function(*args, **(kwargs or {})), function.overloadpacket.__name__
        if name in ("native_group_norm", "upsample_nearest2d"):
            self.inside += (out[0].dtype,)  # a group norm's output, its mean and its std, or an image of the batch
        if name in ("_to_copy", "copy_"):
            assert args[name == "copy_"].device.type == out.device.type, "a copy between devices"
        return out


def assert_float32_on_the_gpu(*tensors):
    assert {(t.device.type, t.dtype) for t in tensors} == {("cuda", torch.float32)}


@pytest.mark.parametrize("name", VARIANTS)
def test_autoencoders_on_a_gpu_are_float32_at_their_ends_alone(name, gpu):
    with torch.device("cuda"):
        vae, image = VARIANTS[name](), torch.zeros(2, 3, 16, 16)

    with gpu:
        output = vae(image)

    assert_float32_on_the_gpu(*output[:4], output.latent_dist.mean, output.latent_dist.std)
    *inside, last = gpu.inside  # the decoder's norm_out, where there is one, is in float32
    assert set(inside) == {torch.bfloat16} and last == (torch.bfloat16 if vae.config.use_smc else torch.float32)


def test_losses_on_a_gpu_are_float32_and_computed_there(gpu, monkeypatch):
    monkeypatch.setattr(litevae, "load_features", lambda *where: None)  # weights stay random
    statistics, weights = evaluation.FeatureStatistics(), dict.fromkeys(litevae.LOSS_WEIGHTS, 1.0)
    with torch.device("cuda"):
        vae, x, inception = small_vae(), torch.zeros(4, 3, 32, 32), evaluation.InceptionV3().eval()
        discriminators = UNetDiscriminator(8), litevae.PatchDiscriminator(8), litevae.StyleGANDiscriminator(32, 8)
        perceptual, esrgan = LPIPS(), litevae.ESRGANPerceptual()
    perceptual.net.scaling_layer.to("cuda")  # lpips builds its buffers on the CPU

    with gpu:
        output, logits = vae(x), [discriminator(x) for discriminator in discriminators]
        y, w = output.sample.bfloat16(), output.wavelet.bfloat16()
        results = [discriminator_loss(real, real) for real in logits]
        for context in (contextlib.nullcontext(), litevae.autocast_off(x)):  # within autocast, and as train.py has it
            with context:
                total, terms = autoencoder_loss(output._replace(sample=y, wavelet=w), x, weights, perceptual, logits[0])
                results += [total, *terms.values(), perceptual(y, x), esrgan(y, x), litevae.ldl_loss(y, x, y),
                            output.latent_dist.kl(), train.psnr(y, x), evaluation.ssim(y, x)]
        with litevae.autocast_off(x):
            features = inception(train.to_pixels(x))
            statistics.update(features)

    assert_float32_on_the_gpu(*results, features)
    assert terms.keys() == {*litevae.LOSS_WEIGHTS, "recon"} and statistics.scatter.device.type == "cuda"


def test_diffusion_on_a_gpu_is_float32_at_its_ends_alone(gpu):
    with torch.device("cuda"):
        vae, unet = small_vae(), sample_ldm.UNet(4, 32, (1, 2), 1, (1,), classes=2)
        image, noise, label = torch.zeros(2, 3, 24, 24), torch.zeros(2, 4, 3, 3), torch.zeros(2, dtype=torch.long)
    denoiser, sigmas = sample_ldm.Denoiser(unet), sample_ldm.sigma_schedule(3)

    with gpu:
        mean, std = sample_ldm.encode(vae, image)
        sigma = sample_ldm.noise_levels(noise[:, 0, 0, 0], 0.0, 1.0)
        loss = sample_ldm.diffusion_loss(denoiser, mean + std * noise, sigma, noise, label)
        denoise = sample_ldm.guided(denoiser, label, 2.0)
        x = sample_ldm.stochastic_sampler(denoise, noise, sigmas, lambda: noise)
        image = sample_ldm.decode(vae, x)

    assert_float32_on_the_gpu(mean, std, sigma, loss, x, image)
    *inside, last = gpu.inside
    assert set(inside) == {torch.bfloat16} and last == torch.float32  # the decoder's norm_out


# --- On a GPU -----------------------------------------------------------------------------------------
# `python -m pytest -k cuda` runs these alone, and those above that are named cuda: in float32 without TF32, but bf16.


@needs_cuda
@pytest.mark.parametrize("script, options", [(train, ["--discriminator", "unet", *DISC]), (sample_ldm, [])])
def test_a_run_that_visits_cuda_equals_one_on_the_cpu(script, options, tmp_path, tiny_ldm, exact):
    expected, _ = trained(tmp_path / "a", *options, "--steps", 6, script=script)
    trained(tmp_path / "b", *options, "--steps", 2, script=script)
    resumed(tmp_path / "b", "--steps", 4, "--device", "cuda", script=script)
    found, _ = resumed(tmp_path / "b", "--steps", 6, "--device", "cpu", script=script)

    for name in {"loss", "adv", "d_loss"} & expected[0].keys():
        curve = [pytest.approx(float(row[name] or 0), rel=2e-3, abs=1e-4) for row in expected]
        assert [float(row[name] or 0) for row in found] == curve, name


@needs_cuda
@pytest.mark.parametrize("options", ["unet", "patchgan", "stylegan", "unet --compile"])
def test_bf16_trains_on_cuda_with_every_discriminator(options, tmp_path):
    log, _ = trained(tmp_path / "a", *DISC, "--discriminator", *options.split(), "--precision", "bf16",
                     "--resolution", 32, "--batch-size", 4, "--device", "cuda", "--steps", 3)

    assert [row["skipped"] for row in log] == ["0", "0", "0"]


# --- assets/results.md --------------------------------------------------------------------------------


def test_the_tables_of_results_are_those_of_their_runs():
    """Differences from a row's base, paired over images; their errors hold the variances over images and over seeds."""
    runs, text = rows(HERE / "assets", "results.csv"), (HERE / "assets" / "results.md").read_text()
    bases = {run["row"]: run["base"] for run in runs}
    digits = {"kodak_psnrs": 2, "builtin_psnrs": 2, "kodak_ssim": 3, "kodak_detail": 2}
    of = {(name, key): np.array([[float(value) for value in run[key].split()] for run in runs if run["row"] == name])
          for name in bases for key in digits}  # (seeds, images), or (seeds, 1)
    over_seeds = {key: np.mean([of[name, key].mean(1).var(ddof=1) for name in bases if len(of[name, key]) > 1])
                  for key in digits}

    expected = {}
    for name, base in bases.items():
        cells = []
        for key, places in digits.items() if base else ():
            row, other = of[name, key], of[base, key]
            paired = row.mean(0) - other.mean(0)
            variance = over_seeds[key] * (1 / len(row) + 1 / len(other))
            variance += paired.var(ddof=1) / len(paired) if len(paired) > 1 else 0
            cells.append(f"{paired.mean():+.{places}f} ± {variance ** 0.5:.{places}f}")
        if base:
            expected[name] = [*cells, str(len(row))]

    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    assert {cells[0]: cells[4:9] for cells in table if cells[0] in expected} == expected


# --- Slow: python -m pytest -m slow -s ----------------------------------------------------------------


def shapes(seed, count):
    """Built-in shapes of 64x64, reduced to (count, 3, 32, 32) in [-1, 1], and their classes, (count,)."""
    images, labels = zip(*map(train.Shapes(64, seed).__getitem__, range(count)))
    return F.avg_pool2d(torch.stack(images) / 127.5 - 1, 2), torch.tensor(labels)


def train_classifier():
    """A network that names at least 99 % of new shapes, and the share that it names."""
    (known, labels), (new, new_labels) = shapes(2**32 - 1, 4096), shapes(2**32 - 2, 512)  # no run trains on these seeds
    layers, width = [], 3
    for channels in (32, 64, 128, 128):
        layers += [nn.Conv2d(width, channels, 3, 2, 1), nn.BatchNorm2d(channels), nn.ReLU()]
        width = channels
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, len(train.SHAPES)))
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    for step in range(5000):
        rows = torch.randint(len(known), (64,))
        # A shape that is turned, mirrored or in other colours keeps its name.
        x = known[rows].rot90(step % 4, (2, 3))[:, torch.randperm(3)]
        loss = F.cross_entropy(network(x.flip(-1) if step % 8 < 4 else x), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 99:
            network.eval()
            right = share_named(network, new, new_labels)
            if right >= 0.99:
                return network, right
            network.train()
    pytest.fail(f"the classifier names {right:.1%} of new shapes")


@torch.no_grad()
def share_named(network, images, labels):
    return (network(images).argmax(dim=1) == labels).float().mean().item()


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # a mark that no configuration file names
    slow = pytest.mark.slow


@slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_samples_of_the_quick_start_show_their_class(seed, request, tmp_path):
    if "slow" not in request.config.option.markexpr:
        pytest.skip("takes minutes: run it with -m slow")
    ldm = tmp_path / "checkpoint.pt"
    assert run(sample_ldm, "train", "--seed", seed, "--out", tmp_path) == 0
    assert run(sample_ldm, "sample", "--ldm", ldm, "-n", 256) == 0
    samples = [torch.from_numpy(image).permute(2, 0, 1) for image in pixels(tmp_path / "samples" / "images")]

    network, right = train_classifier()
    named = share_named(network, F.avg_pool2d(torch.stack(samples) / 127.5 - 1, 2), torch.arange(256) % 8)

    print(f"seed {seed}: a classifier that is right on {right:.1%} of new shapes finds the class in {named:.1%}")
    assert named >= 0.85
