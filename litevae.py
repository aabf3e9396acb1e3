"""LiteVAE in one file: a light autoencoder for latent diffusion (Sadat et al., NeurIPS 2024).

A Haar wavelet transform splits an image into three levels. A small UNet reads each level, and a fourth
UNet aggregates their features into a latent of 1/8 the height and width. The Stable Diffusion decoder
turns the latent back into an image. From top to bottom:

    Part I: LiteVAE
    1  Haar wavelet transform     Sec. 3, App. G       HaarTransform
    2  Building blocks            Sec. 4.2, Eq. 3      SMC, ResBlock, ResBlockWithSMC, MidBlock2D, LiteVAEUNetBlock
    3  Encoder                    Fig. 1, Tabs. 23-24  LiteVAEEncoder
    4  Decoder                    Sec. 4.1             SDVAEDecoder
    5  The autoencoder            App. G               DiagonalGaussianDistribution, Autoencoder, LiteVAE
    6  Losses                     Eq. 1, Sec. 4.3      one function each, autoencoder_loss, discriminator_loss, LPIPS
    7  Discriminator              Sec. 4.3             UNetDiscriminator
    8  Presets and checkpoints    App. F               PRESETS, save_checkpoint, load_checkpoint, released_sd_vae

    Part II: what the paper compares LiteVAE with. Part I does not use it and runs without it.
    9  Baselines                  Tabs. 2, 3, 11-13    SDVAE, DWTVAE
   10  Other encoder parts        Tabs. 18-21          build_variant_encoder, NAFNetExtractor, ViTAggregator
   11  Other losses               Tabs. 8, 14-16       adaptive_weight, ESRGANPerceptual, ldl_loss, logistic_d_loss
   12  Other discriminators       Tab. 10              PatchDiscriminator, StyleGANDiscriminator

Images are (B, 3, H, W) in [-1, 1], with H and W multiples of 8. The axes, here and everywhere below:
B images, C channels, H x W pixels, h x w = H/8 x W/8 latent positions, nz latent channels.

Comments have tags:  # Paper:  the source of a line;  # Differs:  from the pseudocode or a cited work,
and why;  # Unspecified:  the paper is silent, the choice, and why.
"""

import json
import os
import pickle
import warnings
import zipfile
from collections import OrderedDict
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.parametrizations import spectral_norm


# --- 1  Haar wavelet transform (Sec. 3, App. G) -------------------------------------------------------


class HaarTransform(nn.Module):
    """The orthonormal 2D Haar transform and its inverse, without parameters, in float32 or float64. Copy it alone.

    Each 2x2 block of pixels  a b  becomes four numbers, one in each band:
                              c d
        L = (a+b+c+d)/2   H = (a+b-c-d)/2   V = (a-b+c-d)/2   D = (a-b-c+d)/2

    L is twice the mean of the block; H, V and D hold horizontal, vertical and diagonal detail. The transform
    preserves the sum of squares. Channels are ordered by band: [0, C) is L, [C, 2C) H, [2C, 3C) V, [3C, 4C) D.
    """

    # Sums and differences, because convolutions may round to TF32.
    # Differs: the pseudocode turns gradients off, which would stop the wavelet loss from training. Its dwt has
    # default level 3, and it calls idwt with a level that idwt does not take. Here both default to one level.

    def dwt(self, x, level=1):
        """(B, C, H, W) -> (B, 4C, H/2^level, W/2^level): the four bands of that level alone.

        Divide bands of level l by 2^l to bring them to the scale of the pixels.
        """
        return self.cascade(x, level)[-1]

    def cascade(self, x, levels=3):
        """(B, C, H, W) -> [dwt(x, 1), ..., dwt(x, levels)]. ValueError if H or W is no multiple of 2^levels."""
        # Differs: the pseudocode restarts from the image for each level; same values.
        if x.shape[-2] % 2**levels or x.shape[-1] % 2**levels:
            raise ValueError(f"a {levels}-level Haar transform needs a height and width that are multiples of "
                             f"{2**levels}, got an image of {x.shape[-2]}x{x.shape[-1]}")
        low = x if x.dtype == torch.float64 else x.float()
        bands = []
        for _ in range(levels):
            top, bottom = low[..., 0::2, :] / 2, low[..., 1::2, :] / 2  # (B, C, H/2, W) each
            s, d = top + bottom, top - bottom
            low = s[..., 0::2] + s[..., 1::2]  # (B, C, H/2, W/2), as the other three
            h = d[..., 0::2] + d[..., 1::2]
            v = s[..., 0::2] - s[..., 1::2]
            diagonal = d[..., 0::2] - d[..., 1::2]
            bands.append(torch.cat([low, h, v, diagonal], dim=1))
        return bands

    def idwt(self, w):
        """(B, 4C, H, W) -> (B, C, 2H, 2W): the exact inverse of one level, `idwt(dwt(x)) == x`."""
        w = w if w.dtype == torch.float64 else w.float()
        l, h, v, d = (w / 2).chunk(4, dim=1)  # (B, C, H, W) each
        top = torch.stack([l + h + v + d, l + h - v - d], dim=-1).flatten(-2)  # a b: (B, C, H, 2W)
        bottom = torch.stack([l - h + v - d, l - h - v + d], dim=-1).flatten(-2)  # c d
        return torch.stack([top, bottom], dim=-2).flatten(-3, -2)  # (B, C, 2H, 2W)

    def forward(self, x, inverse=False):
        return self.idwt(x) if inverse else self.dwt(x)


# --- 2  Building blocks (Sec. 4.2, Eq. 3, App. G) -----------------------------------------------------

class SMC(nn.Conv2d):
    """Self-modulated convolution (Eq. 3): it normalises its weight, not its input. Copy it alone.

        w'_ijk = s_i w_ijk / sqrt(sum_{i,k} (s_i w_ijk)^2 + eps)

    Here i is the input map, j the output map and k the position in the kernel. Each input map has a learned
    scale s_i, and one learned gain multiplies w'. (B, in, H, W) -> (B, out, H', W').
    """

    # Differs: the pseudocode calls StyleGAN3's modulated_conv2d, which computes one weight per sample. Here the
    # scales do not depend on the sample, so one weight serves the batch. It also ignores the stride it is given.

    def __init__(self, in_channels, out_channels=None, kernel_size=3, stride=1, padding=None, bias=True, eps=1e-8):
        padding = kernel_size // 2 if padding is None else padding
        super().__init__(in_channels, out_channels or in_channels, kernel_size, stride, padding, bias=bias)
        self.gain = nn.Parameter(torch.ones(1))
        self.scales = nn.Parameter(torch.ones(in_channels))
        self.eps = eps  # Unspecified: 1e-8, as in StyleGAN2 and StyleGAN3

    def modulated_weight(self):
        """w' times the gain: (out, in, kh, kw), each output map's w' of norm 1."""
        w = self.weight * self.scales.view(1, -1, 1, 1)  # s_i w_ijk: (out, in, kh, kw)
        norm = w.square().sum(dim=(1, 2, 3), keepdim=True)  # over i and k: (out, 1, 1, 1)
        return self.gain * w * (norm + self.eps).rsqrt()

    def forward(self, x):
        return F.conv2d(x, self.modulated_weight(), self.bias, self.stride, self.padding)


def autocast_off(x):
    """A context without autocast on the device of x."""
    device = x.device.type
    return torch.autocast("cpu" if device == "meta" else device, enabled=False)


def unrounded(conv, x):
    """conv(x) in the precision of its weights, also under autocast."""
    # For the posterior's means: rounding them to bf16 may change them by more than the posterior's std.
    with autocast_off(x):
        return conv(x.to(conv.weight.dtype))


def group_norm(channels, min_channels=1):
    """GroupNorm: 32 groups, or the next smaller power of two that gives groups of min_channels or more."""
    # Differs: the pseudocode always takes 32 groups, which cannot divide LiteVAE-S's 16 and 48 channels.
    groups = next(g for g in (32, 16, 8, 4, 2, 1) if channels % g == 0 and (channels >= g * min_channels or g == 1))
    return GroupNorm(groups, channels, eps=1e-6)


class GroupNorm(nn.GroupNorm):
    """nn.GroupNorm in the precision of x. Groups of one value are allowed: an 8x8 image has one at level 3."""

    def forward(self, x):
        with autocast_off(x):  # CUDA's autocast would return float32, twice the memory
            return torch.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class ResBlock(nn.Module):
    """Pre-activation residual block (App. G): (B, in, H, W) -> (B, out, H, W)."""

    # Differs: App. G has options that its models do not use: dropout, a 3x3 skip, a scale of the sum.

    def __init__(self, in_channels, out_channels=None):
        super().__init__()
        out_channels = out_channels or in_channels
        self.norm_in = group_norm(in_channels)
        self.conv_in = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm_out = group_norm(out_channels)
        self.conv_out = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip_connection = skip_connection(in_channels, out_channels)

    def forward(self, x):
        h = self.conv_in(silu(self.norm_in(x)))  # (B, out, H, W)
        h = self.conv_out(silu(self.norm_out(h)))
        h += self.skip_connection(x)
        return h


class ResBlockWithSMC(nn.Module):
    """The same block with SMC in place of GroupNorm and convolution (App. G)."""

    def __init__(self, in_channels, out_channels=None):
        super().__init__()
        out_channels = out_channels or in_channels
        self.conv_in = SMC(in_channels, out_channels, 3)
        self.conv_out = SMC(out_channels, out_channels, 3)
        self.skip_connection = skip_connection(in_channels, out_channels)

    def forward(self, x):
        h = self.conv_in(F.silu(x))  # (B, out, H, W)
        h = self.conv_out(silu(h))
        h += self.skip_connection(x)
        return h


def silu(x):
    """SiLU, in place where no gradients are wanted: it spares a pass over memory."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


def skip_connection(in_channels, out_channels):
    return nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)


class Downsample2D(nn.Conv2d):
    """Learned downsampling (App. G): (B, C, H, W) -> (B, C, H/scale_factor, W/scale_factor)."""

    # Unspecified: what App. G's Downsample2D is. Paper: Table 3 gives L 41.425 M parameters. Without weights here L
    # has 41.422 M; with a convolution whose kernel and stride are the scale factor, 41.425 M. It starts as the
    # average over each patch.

    def __init__(self, channels, scale_factor):
        super().__init__(channels, channels, scale_factor, stride=scale_factor)

    def reset_parameters(self):
        identity = torch.eye(self.in_channels).view(self.in_channels, self.in_channels, 1, 1)
        self.weight.data.copy_(identity / self.weight[0, 0].numel())  # (C, C, scale_factor, scale_factor)
        nn.init.zeros_(self.bias)


def upsample(x, size):
    """Nearest neighbours at `size`, in the precision of x: (B, C, H, W) -> (B, C, *size)."""
    with autocast_off(x):  # CUDA's autocast would return float32
        return F.interpolate(x, size=tuple(size), mode="nearest")


class MidBlock2D(nn.Module):
    """Two residual blocks, no attention (App. G): (B, in, H, W) -> (B, out, H, W)."""

    # Differs: the pseudocode's default is use_smc=True. The paper's counts need GroupNorm: with SMC here,
    # LiteVAE-M would have 32.74 M parameters, not 32.75 M.

    def __init__(self, in_channels, out_channels, use_smc=False):
        super().__init__()
        block = ResBlockWithSMC if use_smc else ResBlock
        self.res0 = block(in_channels, out_channels)
        self.res1 = block(out_channels, out_channels)

    def forward(self, x):
        return self.res1(self.res0(x))


class LiteVAEUNetBlock(nn.Module):
    """The UNet without down- or upsampling that extracts and aggregates features (Fig. 1, top right; App. G).

    (B, in_channels, H, W) -> (B, out_channels, H, W). Widths grow to model_channels * ch_multiplies and
    shrink back; each decoder block takes one encoder skip.

    To copy it, take ResBlock, MidBlock2D, GroupNorm, group_norm, silu, skip_connection, unrounded, autocast_off;
    with use_smc also ResBlockWithSMC and SMC.
    """

    # Paper: Sec. 4.1, "similar to the ADM model without spatial down/upsampling layers".
    # Differs: App. G also saves in_layer's output as a skip, but no block reads it. Here it is not saved.

    def __init__(self, in_channels, out_channels, model_channels, ch_multiplies=(1, 2, 4), num_res_blocks=2,
                 use_smc=False):
        super().__init__()
        block = ResBlockWithSMC if use_smc else ResBlock
        self.in_layer = nn.Conv2d(in_channels, model_channels, 3, padding=1)

        channels = model_channels
        skips = []  # widths of the skip connections
        self.encoder_blocks = nn.ModuleList()
        for mult in ch_multiplies:
            for _ in range(num_res_blocks):
                self.encoder_blocks.append(block(channels, model_channels * mult))
                channels = model_channels * mult
                skips.append(channels)

        self.mid_block = MidBlock2D(channels, channels, use_smc=use_smc)

        self.decoder_blocks = nn.ModuleList()
        for mult in reversed(ch_multiplies):
            for _ in range(num_res_blocks):
                self.decoder_blocks.append(block(channels + skips.pop(), model_channels * mult))
                channels = model_channels * mult

        self.out_layer = nn.Conv2d(model_channels, out_channels, 3, padding=1)

    def forward(self, x):
        x = self.in_layer(x)  # (B, model_channels, H, W)
        skips = []
        for block in self.encoder_blocks:
            x = block(x)  # (B, model_channels * mult, H, W)
            skips.append(x)
        x = self.mid_block(x)  # (B, model_channels * ch_multiplies[-1], H, W)
        for block in self.decoder_blocks:
            x = torch.cat([x, skips.pop()], dim=1)
            x = block(x)  # (B, model_channels * mult, H, W)
        return unrounded(self.out_layer, x)  # (B, out_channels, H, W)


# --- 3  Encoder (Fig. 1, Tables 23 and 24) ------------------------------------------------------------


class LiteVAEEncoder(nn.Module):
    """Image to the parameters of the posterior (Fig. 1, left half): (B, 3, H, W) -> (B, 2 nz, h, w).

    extractors   three networks, for levels 1, 2 and 3: (B, 12, H', W') -> (B, 12, H', W')
    aggregator   one network: (B, 36, h, w) -> (B, 2 nz, h, w)
    """

    # Differs: the pseudocode runs level 2 through level 1's extractor; the parameter counts need three.

    about = ""  # part of the printed name; Part II's encoders say here what is different in them

    def __init__(self, extractors, aggregator):
        super().__init__()
        self.wavelet_fn = HaarTransform()
        self.feature_extractor_L1, self.feature_extractor_L2, self.feature_extractor_L3 = extractors
        self.downsample_block_L1 = Downsample2D(12, 4)
        self.downsample_block_L2 = Downsample2D(12, 2)
        self.feature_aggregator = aggregator

    def forward(self, image):
        dwt_L1, dwt_L2, dwt_L3 = self.wavelets(image)
        features = torch.cat([
            self.downsample_block_L1(self.feature_extractor_L1(dwt_L1)),  # (B, 12, H/2, W/2) -> (B, 12, h, w)
            self.downsample_block_L2(self.feature_extractor_L2(dwt_L2)),  # (B, 12, H/4, W/4) -> (B, 12, h, w)
            self.feature_extractor_L3(dwt_L3),                            # (B, 12, h, w)
        ], dim=1)  # (B, 36, h, w)
        return self.feature_aggregator(features)  # (B, 2 nz, h, w): mean and log-variance

    def wavelets(self, image):
        """The three levels, each divided by 2^level: its L band is then the mean of pixels, in [-1, 1]."""
        dtype = self.feature_aggregator.in_layer.weight.dtype
        return [(w / 2**level).to(dtype) for level, w in enumerate(self.wavelet_fn.cascade(image), 1)]


def build_encoder(size="B", latent_dim=4):
    """LiteVAE's encoder of one of the PRESETS (Tables 23 and 24)."""
    extractor, aggregator = PRESETS[size]["extractor"], PRESETS[size]["aggregator"]
    bands = 12  # L, H, V, D of three colours
    return LiteVAEEncoder([LiteVAEUNetBlock(bands, bands, *extractor) for _ in range(3)],
                          LiteVAEUNetBlock(3 * bands, 2 * latent_dim, *aggregator))


# --- 4  Decoder (Sec. 4.1: "the same decoder network as in SD-VAE") -----------------------------------
# Names are those of the released Stable Diffusion checkpoints, so that their `decoder.` tensors load here
# with strict=True.


def sd_norm(channels):
    """Stable Diffusion's GroupNorm: 32 groups, or fewer in narrow decoders, of at least 4 channels each."""
    # A group of one channel would lose the mean of its map just before conv_out, and so the brightness: 3.5 dB less
    # after a minute of `--no-use-smc`.
    return group_norm(channels, min_channels=4)


class SDResnetBlock(nn.Module):
    """ResBlock under the names of the SD checkpoints: (B, in, H, W) -> (B, out, H, W)."""

    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.norm1 = sd_norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = sd_norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = skip_connection(in_channels, out_channels)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))  # (B, out, H, W)
        h = self.conv2(F.silu(self.norm2(h)))
        return self.nin_shortcut(x) + h


class SDAttnBlock(nn.Module):
    """Residual self-attention with one head over all positions: (B, C, h, w) -> (B, C, h, w).

    With `use_smc` there is no GroupNorm: the four convolutions are SMCs, and queries and keys are scaled to unit RMS.
    """

    def __init__(self, channels, use_smc=False):
        super().__init__()
        # Unspecified: whether the SMC decoder keeps its attention. It does here: Table 4 changes the
        # normalisation alone. Without GroupNorm, features may grow until the softmax is one-hot. The division
        # of queries and keys by their RMS bounds the logits.
        self.use_smc = use_smc
        conv = SMC if use_smc else nn.Conv2d
        self.norm = nn.Identity() if use_smc else sd_norm(channels)
        self.q = conv(channels, channels, kernel_size=1)
        self.k = conv(channels, channels, kernel_size=1)
        self.v = conv(channels, channels, kernel_size=1)
        self.proj_out = conv(channels, channels, kernel_size=1)

    def forward(self, x):
        B, C, h, w = x.shape
        y = self.norm(x)
        # Contiguous: with other strides CUDA takes the kernel that stores the (hw, hw) matrix.
        q, k, v = [f(y).flatten(2).transpose(1, 2).unsqueeze(1).contiguous() for f in (self.q, self.k, self.v)]
        if self.use_smc:  # q, k, v: (B, 1, hw, C)
            q = F.rms_norm(q, (C,)).to(v.dtype)
            k = F.rms_norm(k, (C,)).to(v.dtype)
        y = F.scaled_dot_product_attention(q, k, v)  # (B, 1, hw, C)
        return x + self.proj_out(y.squeeze(1).transpose(1, 2).reshape(B, C, h, w))


class SDVAEDecoder(nn.Module):
    """The Stable Diffusion decoder: (B, latent_dim, h, w) -> (B, out_channels, sh, sw), s = 2^(len(ch_mult) - 1).

    `channels` is the width at full resolution: 128 in Stable Diffusion (49,490,179 parameters), less for
    small runs. `use_smc` builds it without any GroupNorm (Sec. 4.2).

    To copy it, take SDResnetBlock, SDAttnBlock, sd_norm, GroupNorm, group_norm, skip_connection, upsample,
    autocast_off; with use_smc also ResBlockWithSMC, SMC and silu.
    """

    def __init__(self, latent_dim=4, channels=128, out_channels=3, ch_mult=(1, 2, 4, 4), num_res_blocks=2,
                 use_smc=False):
        super().__init__()
        # Paper: Sec. 4.2 replaces GroupNorm by SMC. In App. G's block both convolutions become SMCs, the shortcut
        # does not. Unspecified: the rest. conv_out and the attention become SMCs; conv_in and upsampling do not.
        block = ResBlockWithSMC if use_smc else SDResnetBlock
        width = channels * ch_mult[-1]
        self.conv_in = nn.Conv2d(latent_dim, width, 3, padding=1)

        self.mid = nn.Sequential(OrderedDict(
            block_1=block(width, width), attn_1=SDAttnBlock(width, use_smc), block_2=block(width, width)))

        self.up = nn.ModuleList()  # up[0]: full resolution, up[-1]: the latent's; built in reverse
        for level in reversed(range(len(ch_mult))):
            stage = nn.Module()
            stage.block = nn.ModuleList()
            for _ in range(num_res_blocks + 1):
                stage.block.append(block(width, channels * ch_mult[level]))
                width = channels * ch_mult[level]
            if level > 0:
                stage.upsample = nn.ModuleDict({"conv": nn.Conv2d(width, width, 3, padding=1)})
            self.up.insert(0, stage)

        self.norm_out = nn.Identity() if use_smc else sd_norm(width)
        self.conv_out = (SMC if use_smc else nn.Conv2d)(width, out_channels, kernel_size=3, padding=1)

    def forward(self, z):
        x = self.conv_in(z)  # (B, channels * ch_mult[-1], h, w)
        x = self.mid(x)
        for level in reversed(range(len(self.up))):
            for block in self.up[level].block:
                x = block(x)  # (B, channels * ch_mult[level], H_level, W_level)
            if level > 0:
                x = self.up[level].upsample.conv(upsample(x, (2 * x.shape[2], 2 * x.shape[3])))
        # Float32 also under autocast: at 30 dB, bf16's rounding of an image changes the losses' gradient by 14 %.
        with autocast_off(x):
            x = x.to(self.conv_out.weight.dtype)
            return self.conv_out(F.silu(self.norm_out(x)))  # (B, out_channels, sh, sw)


# --- 5  The autoencoder (App. G) ----------------------------------------------------------------------


class DiagonalGaussianDistribution:
    """The posterior N(mean, diag(std^2)) over latents, one Gaussian for each latent element.

    `parameters` is (B, 2 nz, h, w): mean, then log-variance. mean, logvar, std are (B, nz, h, w), in at
    least float32.
    """

    def __init__(self, parameters):
        self.dtype = parameters.dtype
        parameters = parameters if parameters.dtype == torch.float64 else parameters.float()
        self.mean, self.logvar = parameters.chunk(2, dim=1)
        self.logvar = self.logvar.clamp(-30.0, 20.0)  # as in LDM: std within [3e-7, 2.2e4]
        self.std = torch.exp(0.5 * self.logvar)

    def sample(self, generator=None, noise=None):
        """A sample, (B, nz, h, w); from `noise` (standard normal, same shape) if given."""
        if noise is None:
            # On the generator's device, so that a CPU generator gives the same latents everywhere.
            device = self.mean.device if generator is None else generator.device
            noise = torch.randn(self.mean.shape, generator=generator, device=device, dtype=self.mean.dtype)
        if noise.shape != self.mean.shape:
            raise ValueError(f"the noise has shape {tuple(noise.shape)}, the latent {tuple(self.mean.shape)}")
        return (self.mean + self.std * noise.to(self.mean)).to(self.dtype)

    def mode(self):
        """The mean, (B, nz, h, w)."""
        return self.mean.to(self.dtype)

    def kl(self):
        """KL divergence from the standard Gaussian in nats, summed over each image's latent: (B,)."""
        return 0.5 * (self.mean.square() + self.std.square() - 1.0 - self.logvar).sum(dim=(1, 2, 3))


# Named tuples work like diffusers' outputs, by attribute and, with return_dict=False, as tuples.
class EncoderOutput(NamedTuple):
    latent_dist: DiagonalGaussianDistribution


class DecoderOutput(NamedTuple):
    sample: torch.Tensor   # (B, 3, H, W), about [-1, 1]; clamp before display
    wavelet: torch.Tensor  # (B, 12, H/2, W/2), its level-1 bands divided by 2


class LiteVAEOutput(NamedTuple):
    sample: torch.Tensor   # (B, 3, H, W)
    wavelet: torch.Tensor  # (B, 12, H/2, W/2)
    latent: torch.Tensor   # (B, nz, h, w)
    kl_reg: torch.Tensor   # (), KL summed over each latent, averaged over the batch
    latent_dist: DiagonalGaussianDistribution


class Config(dict):
    """The constructor's arguments; `config.latent_dim` and `config["latent_dim"]` both work."""

    latent_channels = property(lambda self: self["latent_dim"])  # what scripts for AutoencoderKL read
    block_out_channels = property(lambda self: tuple(self["decoder_channels"] * m for m in (1, 2, 4, 4)))

    def __getattr__(self, name):
        if name in self:
            return self[name]
        raise AttributeError(f"the config has no {name!r}, only {', '.join(self)}")

    def __setattr__(self, name, value):
        self[name] = value


class Autoencoder(nn.Module):
    """An encoder, a Gaussian latent and a decoder (App. G), with the interface of diffusers' AutoencoderKL.

    Images are (B, 3, H, W) in [-1, 1] with H and W multiples of 8; latents are (B, nz, H/8, W/8). `model` is one of
    ENCODERS, `options` are its arguments. A subclass adds `pre_conv` and `post_conv`, which stand around the latent.
    """

    posterior = DiagonalGaussianDistribution

    def __init__(self, latent_dim=4, decoder_channels=128, use_smc=False, output_type="image", scaling_factor=1.0,
                 model="litevae", **options):
        super().__init__()
        self.config = Config(latent_dim=latent_dim, decoder_channels=decoder_channels, use_smc=use_smc,
                             output_type=output_type, scaling_factor=scaling_factor, **options)
        if model != "litevae":
            self.config.model = model
        if output_type not in ("image", "wavelet"):
            raise ValueError(f'output_type must be "image" or "wavelet", got {output_type!r}')
        # Unspecified: the decoder that predicts wavelets. Stable Diffusion's without its last stage, since the 12
        # bands have half the resolution.
        out_channels, ch_mult = (3, (1, 2, 4, 4)) if output_type == "image" else (12, (2, 4, 4))

        # The decoder first: one seed gives the same initial decoder for every encoder.
        decoder = SDVAEDecoder(latent_dim, decoder_channels, out_channels, ch_mult, use_smc=use_smc).apply(initialise)
        self.encoder = ENCODERS[model](latent_dim=latent_dim, **options).apply(initialise)
        self.decoder = decoder
        self.wavelet_fn = HaarTransform()

    def forward(self, image, sample=True, noise=None):
        """Encode, sample (or with sample=False take the mean), decode: a LiteVAEOutput.

        `noise`, (B, nz, h, w), is the standard normal to sample with; without it new noise is made.
        """
        latent_dist = self.encode(image).latent_dist
        latent = latent_dist.sample(noise=noise) if sample else latent_dist.mode()  # (B, nz, h, w)
        reconstruction, wavelet = self.decode(latent)  # (B, 3, H, W), (B, 12, H/2, W/2)
        return LiteVAEOutput(reconstruction, wavelet, latent, latent_dist.kl().mean(), latent_dist)

    def encode(self, image, return_dict=True):
        """(B, 3, H, W) in [-1, 1] -> named tuple with `.latent_dist`, a DiagonalGaussianDistribution.

        ValueError for another shape or for integer pixels. `return_dict`, a name of diffusers', has no effect.
        """
        if image.ndim != 4 or image.shape[1] != 3 or image.shape[2] % 8 or image.shape[3] % 8 or 0 in image.shape:
            raise ValueError("LiteVAE takes images of shape (B, 3, H, W) with H and W multiples of 8 and values in "
                             f"[-1, 1], got shape {tuple(image.shape)}")
        if not image.is_floating_point():
            raise ValueError(f"LiteVAE takes floating-point images in [-1, 1], got {image.dtype}: "
                             "convert 0..255 with image.float() / 127.5 - 1")
        moments = self.encoder(image).to(self.dtype)  # (B, 2 nz, h, w), in float32 also under autocast
        with autocast_off(moments):
            return EncoderOutput(self.posterior(self.pre_conv(moments)))

    def decode(self, latent, return_dict=True, generator=None):
        """(B, nz, h, w) -> named tuple with `.sample`, (B, 3, 8h, 8w), and `.wavelet`, (B, 12, 4h, 4w).

        `return_dict` and `generator`, names of diffusers', have no effect.
        """
        if latent.ndim != 4 or latent.shape[1] != self.config.latent_dim:
            raise ValueError(f"this model decodes latents of shape (B, {self.config.latent_dim}, h, w), "
                             f"got {tuple(latent.shape)}")
        out = self.decoder(self.post_conv(latent.to(self.dtype)))
        if self.config.output_type == "image":
            image = out  # (B, 3, H, W)
            wavelet = self.wavelet_fn.dwt(image, level=1) / 2
        else:
            wavelet = out  # (B, 12, H/2, W/2)
            image = self.wavelet_fn.idwt(wavelet * 2)
        return DecoderOutput(image, wavelet)

    @staticmethod
    def from_checkpoint(checkpoint, device="cpu"):
        """The autoencoder in a file, or in load_checkpoint's dict, in eval mode; of any class in MODELS.

        Its EMA weights, where there are any. FileNotFoundError if there is no such file, CheckpointError if it is
        damaged or its weights do not fit its config.
        """
        if not isinstance(checkpoint, dict):
            checkpoint = load_checkpoint(checkpoint)
        weights = checkpoint.get("ema", checkpoint.get("model"))
        return load_weights(lambda: build_autoencoder(checkpoint.get("config")), weights).to(device).eval()

    dtype = property(lambda self: self.decoder.conv_in.weight.dtype)
    device = property(lambda self: self.decoder.conv_in.weight.device)


class LiteVAE(Autoencoder):
    """LiteVAE (App. G): wavelet encoder, Gaussian latent, Stable Diffusion decoder.

    size              "S", "B", "M" or "L" (Tables 23 and 24): the encoder, see PRESETS
    latent_dim        nz, channels of the latent; the paper uses 4 and 12
    decoder_channels  the decoder's width at full resolution; 128 is Stable Diffusion's
    use_smc           SMC instead of GroupNorm in the decoder (Sec. 4.2, Table 4)
    output_type       "image", or "wavelet": the decoder predicts level-1 bands at half the resolution, and the
                      inverse transform makes the image
    use_1x1_conv      1x1 convolutions around the latent (App. D.2; Table 17 finds them harmful)
    scaling_factor    what diffusion multiplies latents by to bring them to unit variance; train.py measures it
    variant           model="litevae-variant" and its options, which section 10 lists: other parts in the encoder
    """

    def __init__(self, size="B", latent_dim=4, decoder_channels=128, use_smc=False, output_type="image",
                 use_1x1_conv=False, scaling_factor=1.0, **variant):
        if size not in PRESETS:
            raise ValueError(f"size must be one of {', '.join(PRESETS)}, got {size!r}")
        super().__init__(latent_dim, decoder_channels, use_smc, output_type, scaling_factor, size=size, **variant)
        self.config.use_1x1_conv = use_1x1_conv
        conv = nn.Conv2d if use_1x1_conv else nn.Identity  # nn.Identity ignores its arguments
        self.pre_conv = conv(2 * latent_dim, 2 * latent_dim, 1).apply(initialise)
        self.post_conv = conv(latent_dim, latent_dim, 1).apply(initialise)
        # Photographs' wavelets are small: with this gain the means start with a std of about 1/2.
        last = self.pre_conv if use_1x1_conv else self.encoder.feature_aggregator.out_layer
        initialise_posterior(last, gain=4.0)

    name = property(lambda self: f"LiteVAE-{self.config.size}{self.encoder.about}")  # as printed: LiteVAE-B


# Unspecified: initialisation. With PyTorch's, each convolution shrinks the variance of its input to a third, and
# the decoder sees noise: a posterior of std 1 around means of std 0.2. This one gives 2.2 dB more after a minute of
# the quick start.

@torch.no_grad()
def initialise(module):
    """Convolutions keep the variance of their input; residual branches start at zero, as in ADM's code."""
    # Differs: App. G starts the gain of every SMC at 1. Here the last SMC of a residual branch starts with gain 0.
    if isinstance(module, nn.Conv2d) and not isinstance(module, Downsample2D):
        nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    last = {ResBlock: "conv_out", ResBlockWithSMC: "conv_out", SDResnetBlock: "conv2", SDAttnBlock: "proj_out"}
    if type(module) in last:  # apply() visits a block after its convolutions
        conv = getattr(module, last[type(module)])
        nn.init.zeros_(conv.gain if isinstance(conv, SMC) else conv.weight)


@torch.no_grad()
def initialise_posterior(conv, gain):
    """Means `gain` times as large, and a posterior std of e^-3 = 0.05 everywhere."""
    mean, logvar = conv.weight.chunk(2)
    mean.mul_(gain)
    logvar.zero_()
    conv.bias.chunk(2)[1].fill_(-6.0)


# --- 6  Losses (Eq. 1, Sec. 4.3) ----------------------------------------------------------------------
# All are means in at least float32, so that no weight depends on batch size or resolution. Images are (B, 3, H, W)
# in [-1, 1].

# Unspecified: every weight of Eq. 1. What was chosen, and why:
LOSS_WEIGHTS = {
    "l1": 1.0,          # sets the unit: mean absolute error per pixel value, as in LDM
    "mse": 0.0,         # not in the paper; the quick start has it: mse_loss
    "perceptual": 1.0,  # LPIPS on equal terms with L1: LDM, taming-transformers
    "wavelet": 1.0,     # its gradient has 0.6 times the norm of L1's
    "gaussian": 0.5,    # less, because it weighs the same frequencies as the wavelet term
    "kl": 1e-6,         # LDM's value and normalisation: kl_loss
    "adv": 0.1,         # constant (Sec. 4.3, Table 8); what Real-ESRGAN uses with L1 and VGG losses of weight 1
}


def l1_loss(x_hat, x):
    """Mean absolute error, a part of L_recon (Sec. 3): two (B, 3, H, W) -> ()."""
    return (at_least_float32(x_hat) - at_least_float32(x)).abs().mean()


def mse_loss(x_hat, x):
    """Mean squared error: two (B, 3, H, W) -> ()."""
    # Differs: the paper has no such term, and by default it is off. Where a pixel's brightness is further off than its
    # colour, L1's gradient has the same sign in red, green and blue, and colours learn nothing. Short runs need them.
    return (at_least_float32(x_hat) - at_least_float32(x)).square().mean()


def wavelet_loss(w_hat, w, eps=1e-3):
    """Charbonnier loss sqrt(d^2 + eps^2) between the H, V and D bands (Sec. 4.3): two (B, 12, H/2, W/2) -> ().

    Bands as LiteVAE returns them, divided by 2, so that they share the pixels' scale.
    """
    # Paper: only the high-frequency bands (Sec. 4.3), of level 1 (App. G's decode).
    # Unspecified: eps. 1e-3 is the usual value, an eighth of a grey level.
    detail = w.shape[1] // 4
    d = at_least_float32(w_hat)[:, detail:] - at_least_float32(w)[:, detail:]  # (B, 9, H/2, W/2)
    return (d.square() + eps**2).sqrt().mean()


def gaussian_loss(x_hat, x, kernel_size=5, sigma=1.0):
    """L1 between x - h(x) and x_hat - h(x_hat) for a Gaussian blur h (Sec. 4.3): two (B, 3, H, W) -> ()."""
    # Unspecified: size and sigma. Five taps and sigma 1, as in the code of the paper's reference [74].
    # Differs: [74] reflects the border; a replicated one allows images of any size.
    d = at_least_float32(x_hat) - at_least_float32(x)  # the blur is linear: one blur of the difference serves both
    return (d - gaussian_blur(d, kernel_size, sigma)).abs().mean()


def gaussian_blur(x, kernel_size=5, sigma=1.0):
    """Separable Gaussian blur with replicated borders: (B, C, H, W) -> (B, C, H, W)."""
    C, half = x.shape[1], kernel_size // 2
    taps = torch.exp(-0.5 * (torch.arange(-half, half + 1, device=x.device, dtype=x.dtype) / sigma) ** 2)
    taps = (taps / taps.sum()).expand(C, 1, 1, -1)  # (C, 1, 1, k)
    with autocast_off(x):
        x = F.pad(x, (half, half, half, half), mode="replicate")
        x = F.conv2d(x, taps, groups=C)  # along W
        return F.conv2d(x, taps.transpose(2, 3), groups=C)  # along H


def kl_loss(latent_dist, image):
    """L_reg: KL per image, averaged over the batch, divided by the image's 3HW pixel values: ().

    LDM adds 1e-6 times the KL, summed over a latent, to a loss summed over an image. The losses here are means over
    pixel values, so the KL is divided by their number: LDM's weight then fits at any resolution and nz.
    """
    return latent_dist.kl().mean() / image[0].numel()


class LPIPS(nn.Module):
    """Learned perceptual distance of the `lpips` package, in float32: two (B, 3, H, W) in [-1, 1] -> (B,).

    `net` is "vgg", "alex" or "squeeze". FileNotFoundError if its weights cannot be loaded.

    To copy it, take load_features, one_line, at_least_float32 and autocast_off. It needs the package.
    """

    files = {"vgg": "vgg16-397923af.pth", "alex": "alexnet-owt-7be5be79.pth", "squeeze": "squeezenet1_1-b8a52dc0.pth"}

    def __init__(self, net="vgg"):
        super().__init__()
        import lpips  # only here: nothing else in this file needs more than torch

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # lpips calls torchvision with an argument it deprecates
            self.net = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
        load_features(self.net.net.children(), self.files[net])
        self.requires_grad_(False).eval()

    def train(self, mode=True):
        return super().train(False)  # dropout would make the metric noisy

    def forward(self, x_hat, x):
        with autocast_off(x):
            return self.net(at_least_float32(x_hat), at_least_float32(x)).flatten()


def load_features(modules, file):
    """Load the `features.` tensors of torchvision's `file` into modules numbered as in torchvision.

    The file comes from torch's hub cache, or is downloaded. FileNotFoundError if both fail.
    """
    url = f"https://download.pytorch.org/models/{file}"
    try:
        tensors = torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True, weights_only=True)
        for module in modules:
            module.load_state_dict({name: tensors[f"features.{name}"] for name in module.state_dict()})
    except Exception as error:
        path = os.path.join(torch.hub.get_dir(), "checkpoints", file)
        raise FileNotFoundError(f"the perceptual loss needs the weights {url}: put the file at {path} "
                                f"(loading it failed: {one_line(error)})") from None


def hinge_d_loss(real, fake):
    """Hinge loss of the discriminator: max(0, 1 - real) + max(0, 1 + fake), averaged: two logits -> ()."""
    # Differs: taming-transformers and LDM halve this loss and the logistic one. Adam's steps would be the same, but
    # gradients twice as large are clipped more often.
    return F.relu(1.0 - at_least_float32(real)).mean() + F.relu(1.0 + at_least_float32(fake)).mean()


def hinge_g_loss(fake):
    """Hinge loss of the generator: -fake, averaged: logits -> ()."""
    return -at_least_float32(fake).mean()


def discriminator_loss(real_logits, fake_logits, d_loss=hinge_d_loss):
    """The discriminator's side of L_adv: `d_loss` on the global and the per-pixel logits, added, as in [61]."""
    return sum(d_loss(real, fake) for real, fake in zip(real_logits, fake_logits))


def autoencoder_loss(output, image, weights=LOSS_WEIGHTS, perceptual=None, fake_logits=None, g_loss=hinge_g_loss):
    """Eq. 1, the autoencoder's side:  L_recon + lambda_reg L_reg + lambda_adv L_adv.

    output       what LiteVAE(image) returned
    perceptual   an LPIPS, or None to go without
    fake_logits  the discriminator's (global, per-pixel) logits for output.sample, or None to go without
    g_loss       the generator's loss on each of them
    Returns the total, (), and a dict of its unweighted terms plus "recon", the weighted L_recon.
    """
    terms = {"l1": l1_loss(output.sample, image)}
    # A term of weight 0 is not computed.
    if weights.get("mse"):  # the one term that is not of the paper
        terms["mse"] = mse_loss(output.sample, image)
    if perceptual is not None and weights["perceptual"]:
        terms["perceptual"] = perceptual(output.sample, image).mean()
    if weights["wavelet"]:
        terms["wavelet"] = wavelet_loss(output.wavelet, HaarTransform().dwt(image) / 2)
    if weights["gaussian"]:
        terms["gaussian"] = gaussian_loss(output.sample, image)
    recon = sum(weights[name] * value for name, value in terms.items())
    terms["kl"] = kl_loss(output.latent_dist, image)
    total = recon + weights["kl"] * terms["kl"]
    if fake_logits is not None:
        terms["adv"] = sum(g_loss(fake) for fake in fake_logits)
        total = total + weights["adv"] * terms["adv"]
    return total, {**terms, "recon": recon}


def at_least_float32(x):
    return x if x.dtype == torch.float64 else x.float()


# --- 7  Discriminator (Sec. 4.3) ----------------------------------------------------------------------


class UNetDiscriminator(nn.Module):
    """A UNet that classifies the image and every pixel (Schonfeld et al., CVPR 2020; Sec. 4.3).

    (B, 3, H, W) -> (global_logits (B, 1), pixel_logits (B, 1, H, W)); positive means real. Four residual
    blocks down to H/16, whose mean gives the global logit, and four up again with skips. Spectral
    normalisation on every layer; no BatchNorm, which makes logits depend on the batch.

    To copy it, take DiscriminatorBlock, upsample, autocast_off; for its losses at_least_float32, hinge_d_loss,
    hinge_g_loss and discriminator_loss.
    """

    # Unspecified: width and depth. Width 64, as in Schonfeld et al. Their CutMix consistency is left out, because
    # the paper speaks of pixel-wise discrimination only.

    def __init__(self, channels=64, ch_multiplies=(1, 2, 4, 8)):
        super().__init__()
        widths = [channels * m for m in ch_multiplies]
        self.down = nn.ModuleList(DiscriminatorBlock(i, o) for i, o in zip([3] + widths, widths))
        self.to_global = spectral_norm(nn.Linear(widths[-1], 1))
        self.up = nn.ModuleList()
        for i, o in zip(reversed(widths), list(reversed(widths[:-1])) + [channels]):
            self.up.append(DiscriminatorBlock(i if not self.up else 2 * i, o))  # skip concatenated
        self.to_pixel = spectral_norm(nn.Conv2d(channels, 1, 1))

    def forward(self, x):
        skips = []
        for block in self.down:
            skips.append(x)
            x = F.avg_pool2d(block(x), 2)  # (B, channels * mult, H/2, W/2), then H/4, ...
        # Differs: Schonfeld et al. sum over positions; the mean keeps the logit's scale at any resolution.
        global_logits = self.to_global(F.leaky_relu(x, 0.2).mean(dim=(2, 3)))  # (B, 1)
        for block in self.up:
            skip = skips.pop()
            x = block(upsample(x, skip.shape[-2:]))  # (B, channels * mult, H/8, W/8), then H/4, ...
            if skips:  # the last one is the image
                x = torch.cat([x, skip], dim=1)
        return global_logits, self.to_pixel(F.leaky_relu(x, 0.2))  # (B, 1), (B, 1, H, W)


class DiscriminatorBlock(nn.Module):
    """Pre-activation residual block with spectral normalisation: (B, in, H, W) -> (B, out, H, W)."""

    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.conv_in = spectral_norm(nn.Conv2d(in_channels, out_channels, 3, padding=1))
        self.conv_out = spectral_norm(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.skip_connection = nn.Identity() if in_channels == out_channels else \
            spectral_norm(nn.Conv2d(in_channels, out_channels, 1))

    def forward(self, x):
        h = x if x.shape[1] == 3 else F.leaky_relu(x, 0.2)  # pixels go in as they are
        return self.skip_connection(x) + self.conv_out(F.leaky_relu(self.conv_in(h), 0.2))


# --- 8  Presets and checkpoints (App. F) --------------------------------------------------------------

# Paper: Tables 23 and 24, (model_channels, ch_multiplies) of the three extractors and of the aggregator.
# `params` counts the encoder at latent_dim=4; the paper prints 1.03 M, 6.75 M, 32.75 M, 41.42 M (Tables 2, 3).
PRESETS = {
    "S": {"extractor": (16, (1, 2, 2)), "aggregator": (16, (1, 2, 2)), "params": 1_038_596},
    "B": {"extractor": (32, (1, 2, 3)), "aggregator": (32, (1, 2, 3)), "params": 6_753_540},
    "M": {"extractor": (64, (1, 2, 4)), "aggregator": (32, (1, 2, 3)), "params": 32_753_028},
    "L": {"extractor": (64, (1, 2, 4)), "aggregator": (64, (1, 2, 4)), "params": 41_425_284},
}

CHECKPOINT_FORMAT = "litevae-2"  # 1: before Downsample2D had weights

# A config's "model" names the class, and the function that builds its encoder. Part II adds more.
MODELS = {"litevae": LiteVAE}
ENCODERS = {"litevae": build_encoder}


def build_autoencoder(config):
    """The autoencoder, untrained, that a config describes: the dict in a checkpoint, or {"size": "S"}."""
    return MODELS[config.get("model", "litevae")](**config)


class CheckpointError(ValueError):
    """A file that is damaged or the wrong kind of checkpoint; the message is one line."""


def save_checkpoint(path, vae, ema=None, **extra):
    """Write `vae` (an Autoencoder) and `extra` to `path`: tensors, numbers, strings, None, lists and dicts only.

    `ema` is the same model with the EMA weights.
    """
    checkpoint = {"format": CHECKPOINT_FORMAT, "config": dict(vae.config), "model": dict(vae.state_dict())}
    if ema is not None:
        checkpoint["ema"] = dict(ema.state_dict())
    write_checkpoint(path, {**checkpoint, **extra})


def write_checkpoint(path, checkpoint):
    """Write a dict to `path`, atomically: a killed process leaves the previous file intact. OSError if it fails."""
    path = os.fspath(path)
    partial = path + ".partial"
    try:
        with open(partial, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except Exception as error:  # a full disk is an OSError or, within torch, a RuntimeError
        if os.path.exists(partial):
            os.remove(partial)
        raise OSError(f"{path} could not be written; the old file is unchanged ({one_line(error)})") from error


def load_checkpoint(path, format=CHECKPOINT_FORMAT):
    """The dict in the file `path`, on the CPU. A released Stable Diffusion autoencoder is converted to such a dict.

    FileNotFoundError if there is no such file, CheckpointError if it is damaged or no checkpoint of this `format`.
    """
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no checkpoint at {path}")
    try:
        content = read_tensors(path)
        if content.get("format") == format:
            return content
        if format == CHECKPOINT_FORMAT and "format" not in content:
            return released_sd_vae(content)
        problem = f"its format is {content.get('format')}"
        if str(content.get("format")).startswith(format.rstrip("0123456789")):
            problem += ": another version of this program wrote it, so train it anew"
    except pickle.UnpicklingError:
        problem = "it holds more than tensors, numbers and strings, and Python objects are not loaded"
    except Exception as error:  # zipfile and torch raise a dozen kinds for a dozen kinds of damage
        problem = one_line(error)
    raise CheckpointError(f"{path} is no {format} checkpoint, or it is damaged ({problem})")


def read_tensors(path):
    """The content of a file by torch.save, without Python objects, or of a .safetensors. It runs no code."""
    with open(path, "rb") as file:
        if file.read(9)[8:] == b"{":
            return read_safetensors(file)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()  # torch.load does not look at the archive's checksums
        if broken is not None:
            raise ValueError(f"the checksum of {broken} is wrong")
    return torch.load(path, map_location="cpu", weights_only=True)


def read_safetensors(file):
    """{name: tensor}: the file is the header's length in 8 bytes, a header in JSON, and the numbers."""
    dtypes = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    file.seek(0)
    header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    numbers = bytearray(file.read())
    tensors = {}
    for name, entry in header.items():
        if entry.get("dtype") in dtypes:
            start, end = entry["data_offsets"]
            tensor = torch.frombuffer(numbers[start:end], dtype=dtypes[entry["dtype"]])
            tensors[name] = tensor.view(entry["shape"])
    return tensors


# diffusers' names for parts of its AutoencoderKL -> the released checkpoints'. The last four are of older files.
DIFFUSERS_NAMES = {
    "mid_block.resnets.0.": "mid.block_1.", "mid_block.resnets.1.": "mid.block_2.", "resnets.": "block.",
    "mid_block.attentions.0.": "mid.attn_1.", "group_norm.": "norm.",
    "down_blocks.": "down.", "downsamplers.0.": "downsample.", "upsamplers.0.": "upsample.",
    "up_blocks.0.": "up.3.", "up_blocks.1.": "up.2.", "up_blocks.2.": "up.1.", "up_blocks.3.": "up.0.",
    "conv_shortcut.": "nin_shortcut.", "conv_norm_out.": "norm_out.",
    "to_q.": "q.", "to_k.": "k.", "to_v.": "v.", "to_out.0.": "proj_out.",
    "query.": "q.", "key.": "k.", "value.": "v.", "proj_attn.": "proj_out.",
}


def released_sd_vae(content):
    """The {name: tensor} of a released Stable Diffusion autoencoder (kl-f8) as a checkpoint of this project.

    Names are CompVis's, bare or behind "first_stage_model." in a whole diffusion model, or diffusers'. ValueError for
    another network. (SDXL's has the same layout: for that set `config.scaling_factor` to 0.13025.)
    """
    state = {}
    for name, tensor in content.get("state_dict", content).items():
        name = name.removeprefix("first_stage_model.")
        # CompVis's files also hold a discriminator, LPIPS, EMA weights or a whole diffusion model.
        if name.startswith(("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")):
            for theirs, ours in DIFFUSERS_NAMES.items():
                name = name.replace(theirs, ours)
            linear = ".attn_1." in name and tensor.ndim == 2  # a 1x1 convolution here
            state[name] = tensor[:, :, None, None] if linear else tensor
    if not {"encoder.conv_in.weight", "decoder.conv_in.weight", "decoder.norm_out.weight"} <= state.keys():
        raise ValueError("it holds no Stable Diffusion autoencoder either")
    # 0.18215 is what Stable Diffusion multiplies these latents by.
    config = {"model": "sd-vae", "latent_dim": state["decoder.conv_in.weight"].shape[1],
              "decoder_channels": len(state["decoder.norm_out.weight"]), "scaling_factor": 0.18215}
    return {"format": CHECKPOINT_FORMAT, "config": config, "model": state}


def load_weights(build, weights):
    """The module that build() makes of a checkpoint's config, with `weights`, a state dict, in it.

    CheckpointError, which names the first tensor that does not fit, if the two do not belong together.
    """
    try:
        with torch.device("meta"):  # allocates nothing, whatever size the file describes
            module = build()
        expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
        found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"the checkpoint describes no model of this program ({one_line(error)})") from None
    for name in [*expected, *found]:
        if found.get(name) != expected.get(name):
            raise CheckpointError(f"the weights are not those of the model that the checkpoint describes: {name} has "
                                  f"shape {found.get(name)}, the model wants {expected.get(name)}")
    module.load_state_dict({name: tensor.float().clone() for name, tensor in weights.items()}, assign=True)
    return module


def one_line(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# ======================================================================================================
# Part II: what the paper compares LiteVAE with. Nothing above uses it.
# ======================================================================================================
# Each is a flag of train.py; the README has a row for each table, with the commands.

import math  # noqa: E402  Part I does not need it


# --- 9  Baselines (Tables 2, 3, 11 to 13) -------------------------------------------------------------


class SDVAEEncoder(nn.Module):
    """The Stable Diffusion encoder, 34,163,592 parameters: (B, 3, H, W) -> (B, 2 latent_dim, h, w).

    Names are those of the released checkpoints, whose `encoder.` tensors load here with strict=True.
    """

    def __init__(self, latent_dim=4, channels=128, ch_mult=(1, 2, 4, 4), num_res_blocks=2):
        super().__init__()
        self.conv_in = nn.Conv2d(3, channels, 3, padding=1)
        width = channels
        self.down = nn.ModuleList()
        for level, mult in enumerate(ch_mult):
            stage = nn.Module()
            stage.block = nn.ModuleList()
            for _ in range(num_res_blocks):
                stage.block.append(SDResnetBlock(width, channels * mult))
                width = channels * mult
            if level < len(ch_mult) - 1:
                stage.downsample = nn.ModuleDict({"conv": nn.Conv2d(width, width, 3, stride=2)})
            self.down.append(stage)

        self.mid = nn.Sequential(OrderedDict(
            block_1=SDResnetBlock(width, width), attn_1=SDAttnBlock(width), block_2=SDResnetBlock(width, width)))

        self.norm_out = sd_norm(width)
        self.conv_out = nn.Conv2d(width, 2 * latent_dim, 3, padding=1)

    def forward(self, image):
        x = self.conv_in(image.to(self.conv_in.weight.dtype))  # (B, channels, H, W)
        for level, stage in enumerate(self.down):
            for block in stage.block:
                x = block(x)  # (B, channels * ch_mult[level], H_level, W_level)
            if level < len(self.down) - 1:
                x = stage.downsample.conv(F.pad(x, (0, 1, 0, 1)))  # padded on the right and below only
        x = self.mid(x)
        return unrounded(self.conv_out, F.silu(self.norm_out(x)))  # (B, 2 latent_dim, h, w)


def build_small_encoder(latent_dim):
    """VAE-Small's encoder: 6,757,584 parameters at latent_dim=4."""
    # Unspecified: its layout. The paper gives its 6.75 M parameters, which no width of (1, 2, 4, 4) has.
    return SDVAEEncoder(latent_dim, channels=56, ch_mult=(2, 3, 3, 4))


class SDVAE(Autoencoder):
    """The Stable Diffusion autoencoder, and the same with a small encoder (Table 2).

    model   "sd-vae" or "vae-small"; the options are LiteVAE's

    With "sd-vae" and the defaults, the state dict has the names of the released kl-f8 checkpoints.
    """

    def __init__(self, model="sd-vae", latent_dim=4, **options):
        super().__init__(latent_dim, model=model, **options)
        self.quant_conv = nn.Conv2d(2 * latent_dim, 2 * latent_dim, 1).apply(initialise)
        self.post_quant_conv = nn.Conv2d(latent_dim, latent_dim, 1).apply(initialise)
        initialise_posterior(self.quant_conv, gain=1.0)

    # encode and decode know these convolutions by App. G's names.
    pre_conv = property(lambda self: self.quant_conv)
    post_conv = property(lambda self: self.post_quant_conv)
    name = property(lambda self: {"sd-vae": "SD-VAE", "vae-small": "VAE-Small"}[self.config.model])


class DWTEncoder(nn.Module):
    """The encoder that learns nothing (App. B): (B, 3, H, W) -> its latent, (B, latent_dim, h, w).

    With latent_dim=12 the latent is level 3. With 48, level 2's H, V and D follow, by space-to-depth.
    """

    # Paper: App. B, Tables 11 and 12. Unspecified: which "higher frequency sub-bands" DWT-2 adds. These give its 48
    # channels. All bands of level 2 alone would give 48 too.

    def __init__(self, latent_dim):
        super().__init__()
        self.wavelet_fn, self.latent_dim = HaarTransform(), latent_dim

    def forward(self, image):
        _, dwt_L2, dwt_L3 = (w / 2**l for l, w in enumerate(self.wavelet_fn.cascade(image), 1))
        latent = dwt_L3  # (B, 12, h, w)
        if self.latent_dim == 48:
            details = F.pixel_unshuffle(dwt_L2[:, 3:], 2)  # (B, 9, 2h, 2w) -> (B, 36, h, w)
            latent = torch.cat([latent, details], dim=1)  # (B, 48, h, w)
        return latent


class PointDistribution(DiagonalGaussianDistribution):
    """A "posterior" whose every sample is `mean`, (B, nz, h, w); it has no KL."""

    def __init__(self, mean):
        self.dtype, self.mean = mean.dtype, at_least_float32(mean)
        self.std, self.logvar = torch.zeros_like(self.mean), torch.full_like(self.mean, -torch.inf)

    def kl(self):
        return self.mean.new_zeros(len(self.mean))


DWT_LATENTS = {"dwt": 12, "dwt-2": 48}


class DWTVAE(Autoencoder):
    """A wavelet transform for an encoder, and Stable Diffusion's decoder, which alone is trained (App. B).

    model   "dwt" (nz = 12) or "dwt-2" (nz = 48); the options are LiteVAE's
    """

    posterior = PointDistribution

    def __init__(self, model="dwt", latent_dim=None, **options):
        if latent_dim not in (None, DWT_LATENTS[model]):
            raise ValueError(f"the latent of {model} has {DWT_LATENTS[model]} channels, not {latent_dim}")
        super().__init__(DWT_LATENTS[model], model=model, **options)
        self.pre_conv = self.post_conv = nn.Identity()

    name = property(lambda self: self.config.model.upper())


# --- 10  Other encoder parts (Tables 18 to 21) --------------------------------------------------------


def build_variant_encoder(size, latent_dim, extractor="unet", shared_extractor=False, aggregator="unet",
                          last_two_levels=False, resolution=None):
    """LiteVAE's encoder with other parts (App. D.3 to D.6), for LiteVAE(model="litevae-variant").

    extractor          "unet", or "nafnet" (Table 18)
    shared_extractor   one extractor reads all levels (Table 19)
    aggregator         "unet", or "vit" (Table 20), which takes images of `resolution` x `resolution` alone
    last_two_levels    the extractors read levels 2 and 3 only (Table 21)
    """
    if extractor not in ("unet", "nafnet") or aggregator not in ("unet", "vit"):
        raise ValueError('extractor must be "unet" or "nafnet" and aggregator "unet" or "vit", '
                         f"got {extractor!r} and {aggregator!r}")
    if extractor == "nafnet" and size not in NAFNETS:
        raise ValueError(f"the NAFNet extractor has the sizes {' and '.join(NAFNETS)}, got {size!r}")
    if (aggregator == "vit") != (resolution is not None):
        raise ValueError("the ViT aggregator needs the resolution of its images, and no other part does")
    bands, preset = 12, PRESETS[size]

    def extract():
        if extractor == "nafnet":
            return NAFNetExtractor(bands, *NAFNETS[size])
        return LiteVAEUNetBlock(bands, bands, *preset["extractor"])
    extractors = 3 * [extract()] if shared_extractor else [extract() for _ in range(3)]

    levels = 2 if last_two_levels else 3
    model_channels, ch_multiplies = preset["aggregator"]
    if aggregator == "vit":
        width = model_channels * ch_multiplies[-1]
        aggregate = ViTAggregator(levels * bands, 2 * latent_dim, resolution // 8, width)
    else:
        aggregate = LiteVAEUNetBlock(levels * bands, 2 * latent_dim, model_channels, ch_multiplies)

    encoder = (TwoLevelEncoder if last_two_levels else LiteVAEEncoder)(extractors, aggregate)
    parts = {"NAFNet extractor": extractor == "nafnet", "shared extractor": shared_extractor,
             "ViT aggregator": aggregator == "vit", "last two levels": last_two_levels}
    encoder.about = f" ({', '.join(part for part, there in parts.items() if there)})"
    return encoder


class TwoLevelEncoder(LiteVAEEncoder):
    """LiteVAE's encoder without the level of the highest resolution (Table 21): (B, 3, H, W) -> (B, 2 nz, h, w)."""

    def __init__(self, extractors, aggregator):
        super().__init__(extractors, aggregator)
        self.feature_extractor_L1 = self.downsample_block_L1 = nn.Identity()

    def forward(self, image):
        _, dwt_L2, dwt_L3 = self.wavelets(image)
        features = torch.cat([
            self.downsample_block_L2(self.feature_extractor_L2(dwt_L2)),  # (B, 12, H/4, W/4) -> (B, 12, h, w)
            self.feature_extractor_L3(dwt_L3),                            # (B, 12, h, w)
        ], dim=1)  # (B, 24, h, w)
        return self.feature_aggregator(features)


# Unspecified: NAFNet's size. (channels, blocks): as wide as the UNet's widest blocks. The number of blocks brings it
# nearest to the UNet's parameters, so that Table 18 compares kinds of network: S has 261,900, B 1,712,844.
NAFNETS = {"S": (32, 31), "B": (96, 25)}


class NAFNetExtractor(nn.Module):
    """NAFNet at one resolution, as in the NAFSSR the paper cites: (B, bands, H, W) -> (B, bands, H, W)."""

    # Differs: NAFNet, made to restore images, adds its input to its output; the UNet extractor does not.

    def __init__(self, bands, channels, num_blocks):
        super().__init__()
        self.in_layer = nn.Conv2d(bands, channels, 3, padding=1)
        self.blocks = nn.Sequential(*(NAFBlock(channels) for _ in range(num_blocks)))
        self.out_layer = nn.Conv2d(channels, bands, 3, padding=1)

    def forward(self, x):
        x = self.in_layer(x)  # (B, channels, H, W), as the blocks keep it
        return self.out_layer(self.blocks(x))


class NAFBlock(nn.Module):
    """NAFNet's block (Chen et al. 2022), without a nonlinear activation: (B, C, H, W) -> (B, C, H, W).

    A gate, the product of two halves of the channels, stands where others have an activation.
    """

    def __init__(self, channels):
        super().__init__()
        self.norm1 = LayerNorm2d(channels, eps=1e-6)
        self.conv1 = nn.Conv2d(channels, 2 * channels, 1)
        self.conv2 = nn.Conv2d(2 * channels, 2 * channels, 3, padding=1, groups=2 * channels)
        self.sca = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, channels, 1))  # attention to channels
        self.conv3 = nn.Conv2d(channels, channels, 1)
        self.norm2 = LayerNorm2d(channels, eps=1e-6)
        self.conv4 = nn.Conv2d(channels, 2 * channels, 1)
        self.conv5 = nn.Conv2d(channels, channels, 1)
        self.beta = nn.Parameter(torch.zeros(1, channels, 1, 1))  # both branches start at zero
        self.gamma = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x):
        h = simple_gate(self.conv2(self.conv1(self.norm1(x))))  # (B, 2C, H, W) -> (B, C, H, W)
        x = x + self.beta * self.conv3(h * self.sca(h))
        h = simple_gate(self.conv4(self.norm2(x)))
        return x + self.gamma * self.conv5(h)


def simple_gate(x):
    """(B, 2C, H, W) -> (B, C, H, W): one half of the channels times the other."""
    a, b = x.chunk(2, dim=1)
    return a * b


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of each position: (B, C, H, W) -> (B, C, H, W)."""

    def forward(self, x):
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class ViTAggregator(nn.Module):
    """A vision transformer over latent positions (App. D.5): (B, in, side, side) -> (B, out, side, side)."""

    # Paper: Table 20, 0.84 M parameters, beside a UNet of 1.69 M. Unspecified: all else. Here each position is a
    # token, and seven blocks are as wide as the UNet's widest: 841,176 parameters at nz = 12 and 16x16 positions.

    def __init__(self, in_channels, out_channels, side, width, depth=7):
        super().__init__()
        self.in_layer = nn.Conv2d(in_channels, width, 3, padding=1)
        self.positions = nn.Parameter(0.02 * torch.randn(1, side * side, width))
        self.blocks = nn.Sequential(*(ViTBlock(width) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        nn.init.constant_(self.norm.weight, 1 / 8)  # the output then starts as small as the UNet's
        self.out_layer = nn.Conv2d(width, out_channels, 1)

    def forward(self, x):
        B, _, h, w = x.shape
        side = math.isqrt(self.positions.shape[1])
        if (h, w) != (side, side):
            raise ValueError(f"this model's ViT aggregator takes images of {8 * side}x{8 * side} alone (Table 20), "
                             f"got {8 * h}x{8 * w}")
        x = self.in_layer(x).flatten(2).transpose(1, 2) + self.positions  # (B, hw, width)
        x = self.norm(self.blocks(x)).transpose(1, 2).reshape(B, -1, h, w)  # (B, width, h, w)
        return unrounded(self.out_layer, x)


class ViTBlock(nn.Module):
    """Pre-norm transformer block (Dosovitskiy et al. 2021), a head for each 32 channels: (B, N, C) -> (B, N, C)."""

    def __init__(self, width):
        super().__init__()
        self.heads = max(1, width // 32)
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x):
        B, N, C = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(B, N, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # (B, heads, N, C/heads)
        h = F.scaled_dot_product_attention(q, k, v)
        x = x + self.proj(h.transpose(1, 2).reshape(B, N, C))
        return x + self.mlp(self.norm2(x))


MODELS |= {"litevae-variant": LiteVAE, "sd-vae": SDVAE, "vae-small": SDVAE, "dwt": DWTVAE, "dwt-2": DWTVAE}
ENCODERS |= {"litevae-variant": build_variant_encoder, "sd-vae": SDVAEEncoder, "vae-small": build_small_encoder,
             "dwt": DWTEncoder, "dwt-2": DWTEncoder}


# --- 11  Other losses (Eq. 2, Tables 8 and 14 to 16) --------------------------------------------------


def adaptive_weight(recon, adv, last_layer, delta=1e-4, average=lambda gradient: gradient):
    """lambda_adv of Eq. 2:  1/2 ||grad L_recon|| / (||grad L_adv|| + delta), gradients at `last_layer`: a () constant.

    `recon` and `adv` are losses, (); `last_layer` is the decoder's last weight; `average` averages a gradient over
    the processes that share a batch.
    """
    # Unspecified: where the gradients are taken, here and in Figure 7, delta, and a ceiling. As in taming-transformers.
    g_recon, g_adv = gradient_norms((recon, adv), last_layer, average)
    return 0.5 * (g_recon / (g_adv + delta)).clamp(max=1e4)


def gradient_norms(losses, last_layer, average=lambda gradient: gradient):
    """The norm of each loss's gradient at `last_layer`, (). The graph is kept."""
    return [average(torch.autograd.grad(loss, last_layer, retain_graph=True)[0]).norm() for loss in losses]


class ESRGANPerceptual(nn.Module):
    """ESRGAN's perceptual loss (Wang et al. 2018, Table 14): two (B, 3, H, W) in [-1, 1] -> (B,).

    L1 between features of VGG-19's conv5_4 before their activation, in float32. H and W are at least 16.
    FileNotFoundError if torchvision's weights cannot be loaded.
    """

    file = "vgg19-dcbb9e9d.pth"

    def __init__(self):
        super().__init__()
        layers, width = [], 3
        for out in (64, 64, "pool", 128, 128, "pool", *(256,) * 4, "pool", *(512,) * 4, "pool", *(512,) * 4):
            if out == "pool":
                layers.append(nn.MaxPool2d(2))
            else:
                layers += [nn.Conv2d(width, out, 3, padding=1), nn.ReLU(inplace=True)]
                width = out
        self.features = nn.Sequential(*layers[:-1])  # numbered as torchvision's; the last one is conv5_4
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1), persistent=False)
        load_features([self.features], self.file)
        self.requires_grad_(False)

    def forward(self, x_hat, x):
        with autocast_off(x):
            f_hat, f = [self.features(((image.float() + 1) / 2 - self.mean) / self.std) for image in (x_hat, x)]
            return (f_hat - f).abs().mean(dim=(1, 2, 3))  # of (B, 512, H/16, W/16) features


def ldl_loss(x_hat, x, x_ema):
    """Locally discriminative learning (Liang et al. 2022, Table 15): three (B, 3, H, W) in [-1, 1] -> ().

    L1, weighted by where x_hat is likely to hold artifacts; `x_ema` is what the EMA weights make of x.
    """
    # On [0, 1], as in its authors' code. On [-1, 1] the loss would be 10 times as large.
    x_hat, x, x_ema = [(at_least_float32(a) + 1) / 2 for a in (x_hat, x, x_ema)]
    return (artifact_map(x_hat.detach(), x, x_ema) * (x_hat - x)).abs().mean()


def artifact_map(x_hat, x, x_ema, kernel_size=7):
    """LDL's refined map M of three (B, 3, H, W) in [0, 1]: (B, 1, H, W), zero where the EMA weights do worse.

    M = v^(1/5) V. The residual is |x_hat - x|, summed over colours. V is its variance in each 7x7 window, v its
    variance in the whole image.
    """
    # Differs: in the authors' code the gradient also runs through the map. There it is infinite for a perfect
    # reconstruction, because of the fifth root. Here the map is a constant.
    residual = (x_hat - x).abs().sum(dim=1, keepdim=True)  # (B, 1, H, W)
    residual_ema = (x_ema - x).abs().sum(dim=1, keepdim=True)
    half = kernel_size // 2
    windows = F.unfold(F.pad(residual, (half,) * 4, mode="reflect"), kernel_size)  # (B, 49, HW)
    local = windows.var(dim=1).view_as(residual)  # (B, 1, H, W)
    whole = residual.var(dim=(1, 2, 3), keepdim=True) ** 0.2  # (B, 1, 1, 1)
    return torch.where(residual < residual_ema, 0.0, whole * local)


def logistic_d_loss(real, fake):
    """Logistic loss of the discriminator: softplus(-real) + softplus(fake), averaged: two logits -> () (Table 16)."""
    return F.softplus(-at_least_float32(real)).mean() + F.softplus(at_least_float32(fake)).mean()


def logistic_g_loss(fake):
    """Non-saturating logistic loss of the generator: softplus(-fake), averaged: logits -> () (Table 16)."""
    return F.softplus(-at_least_float32(fake)).mean()


# --- 12  Other discriminators (Table 10) --------------------------------------------------------------
# Like UNetDiscriminator they return a tuple of logits, positive for real.


class PatchDiscriminator(nn.Module):
    """pix2pix's PatchGAN, which Stable Diffusion's autoencoder was trained with: (B, 3, H, W) -> ((B, 1, H', W'),).

    Each logit judges 70x70 pixels; H' = H/8 - 2. H and W are at least 24.
    """

    # Differs: taming-transformers' has BatchNorm, which makes logits depend on the batch. Here it is spectral
    # normalisation, as in the UNet.

    def __init__(self, channels=64):
        super().__init__()
        layers, width = [], 3
        for out, stride in ((channels, 2), (2 * channels, 2), (4 * channels, 2), (8 * channels, 1)):
            layers += [spectral_norm(nn.Conv2d(width, out, 4, stride, padding=1)), nn.LeakyReLU(0.2)]
            width = out
        self.layers = nn.Sequential(*layers, spectral_norm(nn.Conv2d(width, 1, 4, padding=1)))

    def forward(self, x):
        return (self.layers(x),)


class StyleGANDiscriminator(nn.Module):
    """StyleGAN2's residual discriminator (Karras et al. 2020): (B, 3, R, R) -> ((B, 1),), R a power of two.

    B is a multiple of 4: the last block sees how much the images of a group of 4 differ. Width is `channels` at full
    resolution and doubles at each halving, up to 512.
    """

    # Unspecified: its width (the original has 128 at 256x256), and whether its R1 penalty is used. It is not used here.

    def __init__(self, resolution, channels=64):
        super().__init__()
        if resolution < 8 or resolution & (resolution - 1):
            raise ValueError(f"StyleGAN2's discriminator takes images of a power of two, got {resolution}")
        width = channels
        self.from_rgb = EqualizedConv2d(3, width, 1)
        self.blocks = nn.ModuleList()
        while resolution > 4:
            self.blocks.append(StyleGANBlock(width, min(2 * width, 512)))
            width, resolution = min(2 * width, 512), resolution // 2
        self.conv = EqualizedConv2d(width + 1, width, 3)
        # Fully connected layers over 4x4 and over 1x1 positions.
        self.dense = EqualizedConv2d(width, width, 4, padding=0)
        self.out = EqualizedConv2d(width, 1, 1)

    def forward(self, x):
        x = scaled_leaky_relu(self.from_rgb(x))  # (B, channels, R, R)
        for block in self.blocks:
            x = block(x)  # (B, min(2^n channels, 512), R/2^n, R/2^n)
        x = torch.cat([x, minibatch_stddev(x).to(x.dtype)], dim=1)  # (B, C + 1, 4, 4)
        x = scaled_leaky_relu(self.conv(x))
        return (self.out(scaled_leaky_relu(self.dense(x))).flatten(1),)  # (B, C, 1, 1) -> (B, 1)


class StyleGANBlock(nn.Module):
    """(B, in, H, W) -> (B, out, H/2, W/2)."""

    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.conv_in = EqualizedConv2d(in_channels, in_channels, 3)
        self.conv_out = EqualizedConv2d(in_channels, out_channels, 3, stride=2, padding=0)
        self.skip_connection = EqualizedConv2d(in_channels, out_channels, 1, stride=2, bias=False)
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
        self.register_buffer("taps", taps[:, None] * taps, persistent=False)  # (4, 4)

    def forward(self, x):
        h = scaled_leaky_relu(self.conv_in(x))
        h = scaled_leaky_relu(self.conv_out(self.blur(h, 2)))  # (B, in, H + 1, W + 1) -> (B, out, H/2, W/2)
        return (self.skip_connection(self.blur(x, 1)) + h) / math.sqrt(2)

    def blur(self, x, padding):
        """By (1, 3, 3, 1) / 8 along both axes: (B, C, H, W) -> (B, C, H + 2 padding - 3, W + 2 padding - 3)."""
        C = x.shape[1]
        return F.conv2d(x, self.taps.to(x.dtype).expand(C, 1, 4, 4), padding=padding, groups=C)


class EqualizedConv2d(nn.Conv2d):
    """A convolution with weights of unit variance, scaled where they are used (Karras et al. 2018).

    All layers then learn at the same relative speed with Adam. StyleGAN2's learning rate is 0.002.
    """

    def __init__(self, in_channels, out_channels, kernel_size, stride=1, padding=None, bias=True):
        super().__init__(in_channels, out_channels, kernel_size, stride,
                         kernel_size // 2 if padding is None else padding, bias=bias)
        nn.init.normal_(self.weight)
        if bias:
            nn.init.zeros_(self.bias)
        self.scale = 1 / math.sqrt(self.weight[0].numel())

    def forward(self, x):
        return F.conv2d(x, self.weight * self.scale, self.bias, self.stride, self.padding)


def scaled_leaky_relu(x):
    """Leaky ReLU times sqrt(2), which about keeps the variance."""
    return F.leaky_relu(x, 0.2) * math.sqrt(2)


def minibatch_stddev(x, group_size=4):
    """How much the images of a group differ, as a map to append: (B, C, H, W) -> (B, 1, H, W), in float32.

    The standard deviation over each group, at every position of every channel, averaged over both. B is a multiple
    of group_size.
    """
    # Differs: StyleGAN2 spreads a group over the batch. Here a group is 4 neighbours: a batch of real and then fake
    # images has no group of both.
    B, C, H, W = x.shape
    groups = x.float().view(B // group_size, group_size, C, H, W)
    std = (groups.var(dim=1, unbiased=False) + 1e-8).sqrt()  # (B / group_size, C, H, W)
    return std.mean(dim=(1, 2, 3)).repeat_interleave(group_size).view(B, 1, 1, 1).expand(B, 1, H, W)
