"""LiteVAE in one file: a light autoencoder for latent diffusion (Sadat et al., NeurIPS 2024).

An image is split by a Haar wavelet transform, three small UNets read one wavelet level each, a fourth
UNet aggregates what they found into a latent 8 times smaller than the image, and the Stable Diffusion
decoder turns the latent back into the image. From top to bottom:

    1  Haar wavelet transform     Sec. 3, App. G       HaarTransform
    2  Building blocks            Sec. 4.2, Eq. 3      SMC, ResBlock, ResBlockWithSMC, MidBlock2D, LiteVAEUNetBlock
    3  Encoder                    Fig. 1, Tabs. 23-24  LiteVAEEncoder
    4  Decoder                    Sec. 4.1             SDVAEDecoder
    5  The autoencoder            App. G               DiagonalGaussianDistribution, LiteVAE
    6  Losses                     Eq. 1, Sec. 4.3      one function each, autoencoder_loss, discriminator_loss, LPIPS
    7  Discriminator              Sec. 4.3             UNetDiscriminator
    8  Presets and checkpoints    App. F               PRESETS, save_checkpoint, load_checkpoint

That is LiteVAE; what stands below it is what the paper compares it with, and can be cut off:

    9  Baselines                  Tables 2 and 3       SDVAEEncoder

Images are (B, 3, H, W) in [-1, 1], with H and W multiples of 8. The axes, here and everywhere below:
B images, C channels, H x W pixels, h x w = H/8 x W/8 latent positions, nz latent channels.

Remarks carry one of three tags:  # Paper:  where a line comes from;  # Differs:  from the paper's
pseudocode, and why;  # Unspecified:  the paper is silent, what was chosen here, and why.

    python litevae.py        prints the sizes, their parameter counts and the shapes on the way
"""

import contextlib
import math
import os
import warnings
import zipfile
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F


# ------------------------------------------------------------------------------------------------------
# 1  Haar wavelet transform (Sec. 3, App. G)
# ------------------------------------------------------------------------------------------------------


class HaarTransform(nn.Module):
    """The orthonormal 2D Haar transform and its inverse; no parameters, any dtype, any device.

    Each 2x2 block of pixels  a b  becomes four numbers, one in each band:
                              c d
        L = (a+b+c+d)/2   H = (a+b-c-d)/2   V = (a-b+c-d)/2   D = (a-b-c+d)/2

    L is twice the mean of the block; H, V and D hold horizontal, vertical and diagonal detail. The
    transform only turns the four axes of each block, so it keeps the energy (the sum of squares). Bands
    are stacked band by band: channels [0, C) are L, [C, 2C) H, [2C, 3C) V, [3C, 4C) D.

    Sums and differences of rows, then of columns: as fast as a stride-2 convolution (faster unless the
    image is channels_last), and exact to float32 also where convolutions are allowed to round to TF32.
    """

    # Differs: the pseudocode calls ptwt inside set_grad_enabled(False), which would cut the gradient of
    # the wavelet loss; and its idwt takes no level but is given one. Here all is differentiable, and
    # idwt inverts one level.

    def dwt(self, x, level=1):
        """(B, C, H, W) -> (B, 4C, H/2^level, W/2^level): the four bands of that level alone.

        Bands of level l divided by 2^l are on the scale of the pixels. ValueError if H or W is not a
        multiple of 2^level.
        """
        return self.cascade(x, level)[-1]

    def cascade(self, x, levels=3):
        """(B, C, H, W) -> [dwt(x, 1), ..., dwt(x, levels)], each level computed once from the L before."""
        # Differs: the pseudocode runs the cascade from the image anew for each level; same values.
        if levels < 1 or x.shape[-2] % 2**levels or x.shape[-1] % 2**levels:
            raise ValueError(f"a {levels}-level Haar transform needs levels >= 1 and height and width that are "
                             f"multiples of {2**levels}, got an image of {x.shape[-2]}x{x.shape[-1]}")
        low, bands = x if x.dtype == torch.float64 else x.float(), []
        for _ in range(levels):
            top, bottom = low[..., 0::2, :] / 2, low[..., 1::2, :] / 2  # (B, C, H/2, W) each
            s, d = top + bottom, top - bottom
            left, right = slice(0, None, 2), slice(1, None, 2)
            low = s[..., left] + s[..., right]  # (B, C, H/2, W/2)
            bands.append(torch.cat([low, d[..., left] + d[..., right],  # L, H
                                    s[..., left] - s[..., right], d[..., left] - d[..., right]], dim=1))  # V, D
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


# ------------------------------------------------------------------------------------------------------
# 2  Building blocks (Sec. 4.2, Eq. 3, App. G)
# ------------------------------------------------------------------------------------------------------
# A trailing underscore marks what computes in place. Convolutions run at full speed already; what an
# encoder loses beside them is passes over memory, and each one left out is time and memory won.


class SMC(nn.Conv2d):
    """Self-modulated convolution (Eq. 3): a convolution that normalises its weight, not its input.

        w'_ijk = s_i w_ijk / sqrt(sum_{i,k} (s_i w_ijk)^2 + eps)

    with i over input maps, j over output maps, k over the kernel, s a learned scale for each input map,
    and a learned gain for all of w'. (B, in, H, W) -> (B, out, H', W'). Output maps keep the magnitudes
    they have relative to each other and across the image, which GroupNorm erases (Fig. 3).
    """

    # Differs: StyleGAN2's modulated_conv2d, which the pseudocode calls with the scales expanded over the
    # batch, runs one grouped convolution per sample because its style depends on the data. These scales
    # do not, so the weight is computed once and one plain convolution follows. The pseudocode also
    # stores no stride and drops the one it is given.

    def __init__(self, in_channels, out_channels=None, kernel_size=3, stride=1, padding=None, bias=True, eps=1e-8):
        padding = kernel_size // 2 if padding is None else padding
        super().__init__(in_channels, out_channels or in_channels, kernel_size, stride, padding, bias=bias)
        self.gain = nn.Parameter(torch.ones(1))
        self.scales = nn.Parameter(torch.ones(in_channels))
        self.eps = eps  # Unspecified: 1e-8, as in StyleGAN2

    def modulated_weight(self):
        """w' times the gain: (out, in, kh, kw), each output map's w' of norm 1."""
        w = self.weight * self.scales.view(1, -1, 1, 1)  # s_i w_ijk: (out, in, kh, kw)
        norm = w.square().sum(dim=(1, 2, 3), keepdim=True)  # over i and k: (out, 1, 1, 1)
        return self.gain * w * (norm + self.eps).rsqrt()

    def forward(self, x):
        return F.conv2d(x, self.modulated_weight(), self.bias, self.stride, self.padding)

    @torch.no_grad()
    def fuse(self):
        """An ordinary nn.Conv2d with the same output, for inference: the weight is folded in for good."""
        conv = nn.Conv2d(self.in_channels, self.out_channels, self.kernel_size, self.stride, self.padding,
                         bias=self.bias is not None, device=self.weight.device, dtype=self.weight.dtype)
        conv.weight.copy_(self.modulated_weight())
        if self.bias is not None:
            conv.bias.copy_(self.bias)
        return conv


def fuse_smc(module):
    """Replace every SMC inside `module` by the nn.Conv2d it amounts to, in place; returns `module`."""
    for name, child in module.named_children():
        if isinstance(child, SMC):
            setattr(module, name, child.fuse())
        else:
            fuse_smc(child)
    return module


def group_norm(channels, min_channels=1):
    """GroupNorm with 32 groups, or as many fewer as divide `channels` into groups of at least min_channels."""
    # Differs: the pseudocode's 32 groups cannot divide LiteVAE-S's 16 channels, nor its 48-channel
    # concatenations. The greatest common divisor is 32 wherever 32 is possible.
    return GroupNorm(math.gcd(32, channels, channels // min_channels), channels, eps=1e-6)


class GroupNorm(nn.GroupNorm):
    """nn.GroupNorm that also takes groups of a single value, as one 8x8 image has them at level 3."""

    def forward(self, x):
        return torch.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


def silu_(x):
    """SiLU of a tensor that nobody else holds: written over it, unless its gradient will be asked for."""
    return F.silu(x, inplace=not x.requires_grad)


class ResBlock(nn.Module):
    """Pre-activation residual block (App. G): (B, in, H, W) -> (B, out, H, W)."""

    def __init__(self, in_channels, out_channels=None, dropout=0.0, use_conv=False, scale_factor=1.0):
        super().__init__()
        out_channels = out_channels or in_channels
        self.norm_in = group_norm(in_channels)
        self.conv_in = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm_out = group_norm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv_out = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip_connection = _skip_connection(in_channels, out_channels, use_conv)
        self.scale_factor = scale_factor

    def forward(self, x):
        h = self.conv_in(silu_(self.norm_in(x)))  # (B, out, H, W)
        h = self.conv_out(self.dropout(silu_(self.norm_out(h))))
        return _residual(self.skip_connection(x), h, self.scale_factor)


class ResBlockWithSMC(nn.Module):
    """The same block with SMC in place of GroupNorm and convolution (App. G)."""

    def __init__(self, in_channels, out_channels=None, dropout=0.0, use_conv=False, scale_factor=1.0):
        super().__init__()
        out_channels = out_channels or in_channels
        self.conv_in = SMC(in_channels, out_channels, 3)
        self.dropout = nn.Dropout(dropout)
        self.conv_out = SMC(out_channels, out_channels, 3)
        self.skip_connection = _skip_connection(in_channels, out_channels, use_conv)
        self.scale_factor = scale_factor

    def forward(self, x):
        h = self.conv_in(F.silu(x))  # (B, out, H, W)
        h = self.conv_out(self.dropout(silu_(h)))
        return _residual(self.skip_connection(x), h, self.scale_factor)


def _skip_connection(in_channels, out_channels, use_conv):
    if in_channels == out_channels:
        return nn.Identity()
    return nn.Conv2d(in_channels, out_channels, 3, padding=1) if use_conv else nn.Conv2d(in_channels, out_channels, 1)


def _residual(x, h, scale_factor):
    """(x + h) / scale_factor, written over h: a convolution's output, which its backward does not need."""
    h += x
    return h if scale_factor == 1 else h / scale_factor


class MidBlock2D(nn.Module):
    """Two residual blocks, no attention (App. G): (B, in, H, W) -> (B, out, H, W)."""

    # Differs: the pseudocode's default is use_smc=True, but with SMC in the encoder's middle blocks
    # LiteVAE-B would have 6.74 M parameters and M 32.74 M; with GroupNorm they have the paper's 6.75 M
    # and 32.75 M.

    def __init__(self, in_channels, out_channels, dropout=0.0, use_smc=False):
        super().__init__()
        block = ResBlockWithSMC if use_smc else ResBlock
        self.res0 = block(in_channels, out_channels, dropout)
        self.res1 = block(out_channels, out_channels, dropout)

    def forward(self, x):
        return self.res1(self.res0(x))


class LiteVAEUNetBlock(nn.Module):
    """The UNet without down- or upsampling that extracts and aggregates features (Fig. 1, top right; App. G).

    (B, in_channels, H, W) -> (B, out_channels, H, W). Widths grow to model_channels * ch_multiplies and
    shrink back; each decoder block sees one encoder output again.
    """

    # Paper: Sec. 4.1, "similar to the ADM model without spatial down/upsampling layers".

    def __init__(self, in_channels, out_channels, model_channels, ch_multiplies=(1, 2, 4), num_res_blocks=2,
                 use_smc=False):
        super().__init__()
        block = ResBlockWithSMC if use_smc else ResBlock
        self.in_layer = nn.Conv2d(in_channels, model_channels, 3, padding=1)

        channels, skips = model_channels, [model_channels]
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
        skip_features = []
        for block in self.encoder_blocks:
            x = block(x)  # (B, model_channels * mult, H, W)
            skip_features.append(x)
        x = self.mid_block(x)  # (B, model_channels * ch_multiplies[-1], H, W)
        for block in self.decoder_blocks:
            x = torch.cat([x, skip_features.pop()], dim=1)  # in a line of its own, so that the parts are freed
            x = block(x)
        return self.out_layer(x)  # (B, out_channels, H, W)


# ------------------------------------------------------------------------------------------------------
# 3  Encoder (Fig. 1, Tables 23 and 24)
# ------------------------------------------------------------------------------------------------------


class LiteVAEEncoder(nn.Module):
    """Image to the parameters of the posterior (Fig. 1, left half): (B, 3, H, W) -> (B, 2 nz, h, w).

    `extractor` and `aggregator` are (model_channels, ch_multiplies), as in PRESETS.
    """

    def __init__(self, latent_dim=4, extractor=(32, (1, 2, 3)), aggregator=(32, (1, 2, 3))):
        super().__init__()
        bands = 12  # L, H, V, D of three colours
        self.wavelet_fn = HaarTransform()
        # Differs: the pseudocode runs level 2 through level 1's extractor; the counts have room for three.
        self.feature_extractor_L1 = LiteVAEUNetBlock(bands, bands, *extractor)
        self.feature_extractor_L2 = LiteVAEUNetBlock(bands, bands, *extractor)
        self.feature_extractor_L3 = LiteVAEUNetBlock(bands, bands, *extractor)
        # Unspecified: Downsample2D. The paper's parameter counts leave none for it: average pooling.
        self.downsample_block_L1 = nn.AvgPool2d(4)
        self.downsample_block_L2 = nn.AvgPool2d(2)
        self.feature_aggregator = LiteVAEUNetBlock(3 * bands, 2 * latent_dim, *aggregator)

    def forward(self, image):
        if image.device.type == "cpu" and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # The feature maps of 256x256 pixels stay in a CPU's cache, those of a batch do not.
            few = max(1, 2**16 // image.shape[2:].numel())
            if len(image) > few:
                return torch.cat([self.forward(part) for part in image.split(few)])
        # Dividing level l by 2^l brings its L band to the mean of 2^l x 2^l pixels, so to [-1, 1].
        dtype = self.feature_aggregator.in_layer.weight.dtype
        dwt_L1, dwt_L2, dwt_L3 = ((w / 2**l).to(dtype) for l, w in enumerate(self.wavelet_fn.cascade(image), 1))
        features = torch.cat([
            self.downsample_block_L1(self.feature_extractor_L1(dwt_L1)),  # (B, 12, H/2, W/2) -> (B, 12, h, w)
            self.downsample_block_L2(self.feature_extractor_L2(dwt_L2)),  # (B, 12, H/4, W/4) -> (B, 12, h, w)
            self.feature_extractor_L3(dwt_L3),                            # (B, 12, h, w)
        ], dim=1)  # (B, 36, h, w)
        return self.feature_aggregator(features)  # (B, 2 nz, h, w): mean and log-variance


# ------------------------------------------------------------------------------------------------------
# 4  Decoder (Sec. 4.1: "the same decoder network as in SD-VAE")
# ------------------------------------------------------------------------------------------------------
# Names are those of the released Stable Diffusion checkpoints, so that their `decoder.` tensors load here
# with strict=True.


def sd_norm(channels):
    """Stable Diffusion's GroupNorm: 32 groups of 4 channels at its full width, no smaller groups at narrower ones."""
    # One channel in a group would be instance normalisation, which erases the mean of each map just
    # before conv_out, and with it the image's brightness: 3.5 dB less after a minute of the quick start.
    return group_norm(channels, min_channels=4)


class SDResnetBlock(nn.Module):
    """ResBlock under the names of the SD checkpoints: (B, in, H, W) -> (B, out, H, W)."""

    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.norm1 = sd_norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = sd_norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = _skip_connection(in_channels, out_channels, use_conv=False)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))  # (B, out, H, W)
        h = self.conv2(F.silu(self.norm2(h)))
        return self.nin_shortcut(x) + h


class SDAttnBlock(nn.Module):
    """Residual self-attention with one head over all positions: (B, C, h, w) -> (B, C, h, w).

    Through scaled_dot_product_attention, which never holds the (hw, hw) matrix where the device has a
    memory-efficient kernel. With `use_smc` there is no GroupNorm: queries, keys, values and the output
    are SMCs, and queries and keys are scaled to unit RMS.
    """

    def __init__(self, channels, use_smc=False):
        super().__init__()
        # Unspecified: whether the SMC decoder keeps its attention. It does here: Table 4 changes the
        # normalisation alone. Without one, features may grow and attention harden into one-hot picks;
        # dividing queries and keys by their RMS bounds the logits and mixes no positions.
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
        q, k, v = (f(y).flatten(2).transpose(1, 2).unsqueeze(1) for f in (self.q, self.k, self.v))  # (B, 1, hw, C)
        if self.use_smc:
            q, k = (F.rms_norm(a, (C,)).to(v.dtype) for a in (q, k))
        y = F.scaled_dot_product_attention(q, k, v)  # (B, 1, hw, C)
        return x + self.proj_out(y.squeeze(1).transpose(1, 2).reshape(B, C, h, w))


class SDVAEDecoder(nn.Module):
    """The Stable Diffusion decoder: (B, latent_dim, h, w) -> (B, out_channels, sh, sw), s = 2^(len(ch_mult) - 1).

    `channels` is the width at full resolution: 128 in Stable Diffusion (49,490,179 parameters), less for
    small runs. `use_smc` builds it without any GroupNorm (Sec. 4.2).
    """

    def __init__(self, latent_dim=4, channels=128, out_channels=3, ch_mult=(1, 2, 4, 4), num_res_blocks=2,
                 use_smc=False):
        super().__init__()
        # Paper: Sec. 4.2 replaces GroupNorm by SMC. Each convolution that a GroupNorm preceded becomes an
        # SMC; conv_in, the shortcuts and the upsampling convolutions, which none preceded, stay plain.
        block = ResBlockWithSMC if use_smc else SDResnetBlock
        width = channels * ch_mult[-1]
        self.conv_in = nn.Conv2d(latent_dim, width, 3, padding=1)

        self.mid = nn.Module()
        self.mid.block_1 = block(width, width)
        self.mid.attn_1 = SDAttnBlock(width, use_smc)
        self.mid.block_2 = block(width, width)

        self.up = nn.ModuleList()  # up[0] is the full resolution, up[-1] the latent's: built from the end
        for level in reversed(range(len(ch_mult))):
            stage = nn.Module()
            stage.block = nn.ModuleList()
            for _ in range(num_res_blocks + 1):
                stage.block.append(block(width, channels * ch_mult[level]))
                width = channels * ch_mult[level]
            if level > 0:
                stage.upsample = nn.Module()
                stage.upsample.conv = nn.Conv2d(width, width, 3, padding=1)
            self.up.insert(0, stage)

        self.norm_out = nn.Identity() if use_smc else sd_norm(width)
        self.conv_out = (SMC if use_smc else nn.Conv2d)(width, out_channels, kernel_size=3, padding=1)

    def forward(self, z):
        x = self.conv_in(z)  # (B, channels * ch_mult[-1], h, w)
        x = self.mid.block_2(self.mid.attn_1(self.mid.block_1(x)))
        for level in reversed(range(len(self.up))):
            for block in self.up[level].block:
                x = block(x)  # (B, channels * ch_mult[level], H_level, W_level)
            if level > 0:
                x = self.up[level].upsample.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return self.conv_out(F.silu(self.norm_out(x)))  # (B, out_channels, sh, sw)


# ------------------------------------------------------------------------------------------------------
# 5  The autoencoder (App. G)
# ------------------------------------------------------------------------------------------------------


class DiagonalGaussianDistribution:
    """The posterior N(mean, diag(std^2)) over latents, one Gaussian for each latent element.

    `parameters` is (B, 2 nz, h, w): mean, then log-variance. mean, logvar, std are (B, nz, h, w), in at
    least float32. Log-variance is clamped to [-30, 20].
    """

    def __init__(self, parameters):
        self.dtype = parameters.dtype
        parameters = parameters if parameters.dtype == torch.float64 else parameters.float()
        self.mean, self.logvar = parameters.chunk(2, dim=1)
        self.logvar = self.logvar.clamp(-30.0, 20.0)  # as in LDM: std within [3e-7, 2.2e4]
        self.std = torch.exp(0.5 * self.logvar)

    def sample(self, generator=None, noise=None):
        """A draw, (B, nz, h, w); from `noise` (standard normal, same shape) where it is given."""
        if noise is None:
            # Drawn where the generator lives, so that a CPU generator gives the same latents on any device.
            device = self.mean.device if generator is None else generator.device
            noise = torch.randn(self.mean.shape, generator=generator, device=device, dtype=self.mean.dtype)
        return (self.mean + self.std * noise.to(self.mean)).to(self.dtype)

    def mode(self):
        """The mean, (B, nz, h, w)."""
        return self.mean.to(self.dtype)

    def kl(self):
        """KL divergence from the standard Gaussian in nats, summed over each image's latent: (B,)."""
        return 0.5 * (self.mean.square() + self.std.square() - 1.0 - self.logvar).sum(dim=(1, 2, 3))


# Named tuples answer both to diffusers' attribute access and, with return_dict=False, to its tuples.
class EncoderOutput(NamedTuple):
    latent_dist: DiagonalGaussianDistribution


class DecoderOutput(NamedTuple):
    sample: torch.Tensor   # (B, 3, H, W), about [-1, 1]; clamp before you look at it
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


class LiteVAE(nn.Module):
    """LiteVAE (App. G): wavelet encoder, Gaussian latent, Stable Diffusion decoder.

    size            "S", "B", "M" or "L": the encoder, see PRESETS (Tables 23 and 24)
    latent_dim      nz, channels of the latent; the paper uses 4 and 12
    decoder_channels  the decoder's width at full resolution; 128 is Stable Diffusion's
    use_smc         SMC instead of GroupNorm in the decoder (Sec. 4.2, Table 4)
    output_type     "image", or "wavelet": the decoder predicts level-1 bands at half the resolution and
                    the inverse transform, which is exact and free, does the last doubling
    use_1x1_conv    1x1 convolutions around the latent (App. D.2; Table 17 finds them harmful)
    scaling_factor  what diffusion multiplies latents by to bring them to unit variance; train.py measures it

    Images are (B, 3, H, W) in [-1, 1] with H and W multiples of 8; latents are (B, nz, H/8, W/8).
    """

    def __init__(self, size="B", latent_dim=4, decoder_channels=128, use_smc=False, output_type="image",
                 use_1x1_conv=False, scaling_factor=1.0):
        super().__init__()
        if size not in PRESETS:
            raise ValueError(f"size must be one of {', '.join(PRESETS)}, got {size!r}")
        if output_type not in ("image", "wavelet"):
            raise ValueError(f'output_type must be "image" or "wavelet", got {output_type!r}')
        if latent_dim < 1 or decoder_channels < 1:
            raise ValueError(f"latent_dim and decoder_channels must be 1 or more, got {latent_dim}, {decoder_channels}")
        self.config = Config(size=size, latent_dim=latent_dim, decoder_channels=decoder_channels, use_smc=use_smc,
                             output_type=output_type, use_1x1_conv=use_1x1_conv, scaling_factor=scaling_factor)

        self.encoder = LiteVAEEncoder(latent_dim, PRESETS[size]["extractor"], PRESETS[size]["aggregator"])
        self.wavelet_fn = self.encoder.wavelet_fn
        # Unspecified: the decoder that predicts wavelets. Stable Diffusion's without its last stage, since
        # the 12 bands live at half the resolution.
        self.decoder = SDVAEDecoder(latent_dim, decoder_channels, 3, (1, 2, 4, 4), use_smc=use_smc) \
            if output_type == "image" else \
            SDVAEDecoder(latent_dim, decoder_channels, 12, (2, 4, 4), use_smc=use_smc)
        self.pre_conv = nn.Conv2d(2 * latent_dim, 2 * latent_dim, 1) if use_1x1_conv else nn.Identity()
        self.post_conv = nn.Conv2d(latent_dim, latent_dim, 1) if use_1x1_conv else nn.Identity()
        self.apply(_initialise)
        _initialise_posterior(self.pre_conv if use_1x1_conv else self.encoder.feature_aggregator.out_layer)

    def encode(self, image, return_dict=True):
        """(B, 3, H, W) in [-1, 1] -> named tuple with `.latent_dist`, a DiagonalGaussianDistribution.

        ValueError for another shape or for integer pixels. `return_dict` is diffusers': a named tuple is
        right for both its values.
        """
        if image.ndim != 4 or image.shape[1] != 3 or image.shape[2] % 8 or image.shape[3] % 8 or 0 in image.shape:
            raise ValueError("LiteVAE takes images of shape (B, 3, H, W) with H and W multiples of 8 and values in "
                             f"[-1, 1], got shape {tuple(image.shape)}")
        if not image.is_floating_point():
            raise ValueError(f"LiteVAE takes floating-point images in [-1, 1], got {image.dtype}: "
                             "convert 0..255 with image.float() / 127.5 - 1")
        moments = self.pre_conv(self.encoder(image))  # (B, 2 nz, h, w)
        # Under autocast the moments arrive in bf16; the latent goes on in the weights' own precision.
        return EncoderOutput(DiagonalGaussianDistribution(moments.to(self.dtype)))

    def decode(self, latent, return_dict=True, generator=None):
        """(B, nz, h, w) -> named tuple with `.sample`, (B, 3, 8h, 8w), and `.wavelet`, (B, 12, 4h, 4w).

        `return_dict` and `generator` are diffusers': a named tuple is right for both values of the first,
        and decoding draws nothing.
        """
        if latent.ndim != 4 or latent.shape[1] != self.config.latent_dim:
            raise ValueError(f"this LiteVAE decodes latents of shape (B, {self.config.latent_dim}, h, w), "
                             f"got {tuple(latent.shape)}")
        out = self.decoder(self.post_conv(latent.to(self.dtype)))
        if self.config.output_type == "image":
            image = out  # (B, 3, H, W)
            wavelet = self.wavelet_fn.dwt(image, level=1) / 2
        else:
            wavelet = out  # (B, 12, H/2, W/2)
            image = self.wavelet_fn.idwt(wavelet * 2)
        return DecoderOutput(image, wavelet)

    def forward(self, image, sample=True, noise=None):
        """Encode, draw (or with sample=False take the mean), decode: a LiteVAEOutput.

        `noise` replaces the draw's standard normal, (B, nz, h, w).
        """
        latent_dist = self.encode(image).latent_dist
        latent = latent_dist.sample(noise=noise) if sample else latent_dist.mode()
        reconstruction, wavelet = self.decode(latent)
        return LiteVAEOutput(reconstruction, wavelet, latent, latent_dist.kl().mean(), latent_dist)

    @classmethod
    def from_checkpoint(cls, path, device="cpu", ema=True):
        """The autoencoder stored in `path` by save_checkpoint, in eval mode.

        `ema` picks the averaged weights where the file has them. ValueError if the file is damaged or is
        no such checkpoint; FileNotFoundError if it is not there.
        """
        checkpoint = load_checkpoint(path)
        try:
            vae = cls.from_state(checkpoint, ema)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"the weights in {path} are not those of the model it describes "
                             f"({_one_line(error)})") from None
        return vae.to(device).eval()

    @classmethod
    def from_state(cls, checkpoint, ema=True):
        """The autoencoder in a dict that holds its "config" and "model" (and "ema"), as load_checkpoint's does."""
        vae = cls(**checkpoint["config"])
        vae.load_state_dict(checkpoint.get("ema", checkpoint["model"]) if ema else checkpoint["model"])
        return vae

    def fuse(self):
        """Fold every SMC into a plain convolution, in place, for inference; returns self. Same output."""
        return fuse_smc(self)

    @property
    def dtype(self):
        return self.encoder.feature_aggregator.in_layer.weight.dtype

    @property
    def device(self):
        return self.encoder.feature_aggregator.in_layer.weight.device


# Unspecified: initialisation. With PyTorch's defaults each convolution shrinks its input's variance to a
# third, and the posterior starts with std 1 around means of std 0.2: the decoder sees noise. Starting as
# below is worth 2.2 dB after a minute of the quick start.


@torch.no_grad()
def _initialise(module):
    """Convolutions keep the variance of their input; residual branches start at zero, as in ADM's code."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    last = {ResBlock: "conv_out", ResBlockWithSMC: "conv_out", SDResnetBlock: "conv2", SDAttnBlock: "proj_out"}
    if type(module) in last:  # apply() visits a block after its convolutions
        conv = getattr(module, last[type(module)])
        nn.init.zeros_(conv.gain if isinstance(conv, SMC) else conv.weight)


@torch.no_grad()
def _initialise_posterior(conv):
    """Means of std about 1/2 for photographs, whose wavelets are small, and a posterior std of e^-3 = 0.05."""
    mean, logvar = conv.weight.chunk(2)
    mean.mul_(4.0)
    logvar.zero_()
    conv.bias.chunk(2)[1].fill_(-6.0)


# ------------------------------------------------------------------------------------------------------
# 6  Losses (Eq. 1, Sec. 4.3)
# ------------------------------------------------------------------------------------------------------
# All are computed in at least float32 and averaged over everything they are summed over, so that no
# weight depends on batch size or resolution. Images are (B, 3, H, W) in [-1, 1].

# Unspecified: every weight of Eq. 1. What was chosen, and why:
LOSS_WEIGHTS = {
    "l1": 1.0,          # sets the unit: mean absolute error per pixel value, as in LDM
    "perceptual": 1.0,  # LPIPS on equal terms with L1: LDM, taming-transformers
    "wavelet": 1.0,     # detail bands are a few times smaller than pixels: a gentle term at equal weight
    "gaussian": 0.5,    # overlaps with the wavelet term, which already weighs the same frequencies
    "kl": 1e-6,         # LDM's number in LDM's balance, see kl_loss
    "adv": 0.1,         # constant (Sec. 4.3, Table 8); what Real-ESRGAN uses with L1 and VGG losses of weight 1
}


def l1_loss(x_hat, x):
    """Mean absolute error, a part of L_recon (Sec. 3): two (B, 3, H, W) -> ()."""
    return (_at_least_float32(x_hat) - _at_least_float32(x)).abs().mean()


def wavelet_loss(w_hat, w, eps=1e-3):
    """Charbonnier loss sqrt(d^2 + eps^2) between the H, V and D bands (Sec. 4.3): two (B, 12, H/2, W/2) -> ().

    Bands as LiteVAE returns them, divided by 2, so that they share the pixels' scale.
    """
    # Paper: only the high-frequency bands; L1 on the pixels already covers the low one.
    # Unspecified: eps. 1e-3 is the usual value: an eighth of one grey level, below it the loss is a parabola.
    detail = w.shape[1] // 4
    d = _at_least_float32(w_hat)[:, detail:] - _at_least_float32(w)[:, detail:]  # (B, 9, H/2, W/2)
    return (d.square() + eps**2).sqrt().mean()


def gaussian_loss(x_hat, x, kernel_size=5, sigma=1.0):
    """L1 between x - h(x) and x_hat - h(x_hat) for a Gaussian blur h (Sec. 4.3): two (B, 3, H, W) -> ()."""
    # Unspecified: size and sigma. x - h(x) for sigma 1 keeps waves shorter than about 5 pixels, of which the
    # level-1 bands, on 2x2 blocks, see only a part; five taps hold 99 % of that Gaussian's mass.
    d = _at_least_float32(x_hat) - _at_least_float32(x)  # blurring is linear: one blur of the difference serves both
    return (d - gaussian_blur(d, kernel_size, sigma)).abs().mean()


def gaussian_blur(x, kernel_size=5, sigma=1.0):
    """Separable Gaussian blur with replicated borders: (B, C, H, W) -> (B, C, H, W)."""
    C, half = x.shape[1], kernel_size // 2
    taps = torch.exp(-0.5 * (torch.arange(-half, half + 1, device=x.device, dtype=x.dtype) / sigma) ** 2)
    taps = (taps / taps.sum()).expand(C, 1, 1, -1)  # (C, 1, 1, k)
    with _autocast_off(x):
        x = F.pad(x, (half, half, half, half), mode="replicate")
        x = F.conv2d(x, taps, groups=C)  # along W
        return F.conv2d(x, taps.transpose(2, 3), groups=C)  # along H


def kl_loss(latent_dist, image):
    """L_reg: KL per image, averaged over the batch, divided by the image's 3HW pixel values: ().

    LDM weighs the KL summed over a latent by 1e-6 against a reconstruction loss summed over an image.
    Ours is a mean over pixel values; dividing the KL's sum by their number keeps exactly LDM's balance at
    any resolution and any nz. (For nz=4 it equals 2.1e-8 on the KL's mean over latent elements.)
    """
    return latent_dist.kl().mean() / image[0].numel()


class LPIPS(nn.Module):
    """Learned perceptual distance of the `lpips` package: two (B, 3, H, W) in [-1, 1] -> (B,).

    Frozen, always in eval mode, in float32. The package brings its linear layers; the trunk, torchvision's VGG-16
    (or `net` "alex", "squeeze"), is looked for in torch's hub cache, else downloaded. FileNotFoundError if
    neither works.
    """

    trunks = {"vgg": "vgg16-397923af.pth", "alex": "alexnet-owt-7be5be79.pth", "squeeze": "squeezenet1_1-b8a52dc0.pth"}

    def __init__(self, net="vgg"):
        super().__init__()
        import lpips  # only here: nothing else in this file needs more than torch

        with warnings.catch_warnings(), contextlib.redirect_stdout(None):
            warnings.simplefilter("ignore")  # lpips calls torchvision with an argument it deprecates
            self.net = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
        self._load_trunk(self.trunks[net])
        self.requires_grad_(False).eval()

    def _load_trunk(self, file):
        path = os.path.join(torch.hub.get_dir(), "checkpoints", file)
        url = f"https://download.pytorch.org/models/{file}"
        try:
            if not os.path.exists(path):
                os.makedirs(os.path.dirname(path), exist_ok=True)
                torch.hub.download_url_to_file(url, path, hash_prefix=file.split("-")[-1].removesuffix(".pth"))
            trunk = torch.load(path, map_location="cpu", weights_only=True)
            for layer in self.net.net.children():  # slice1, slice2, ...: numbered as in torchvision's `features`
                layer.load_state_dict({name: trunk[f"features.{name}"] for name in layer.state_dict()})
        except Exception as error:
            raise FileNotFoundError(f"LPIPS needs the weights {url}: put the file at {path} "
                                    f"(loading it failed with: {_one_line(error)})") from None

    def train(self, mode=True):
        return super().train(False)  # dropout would make the metric noisy

    def forward(self, x_hat, x):
        # Differs: lpips divides features by sqrt(sum f^2) + eps, whose gradient is NaN where the squares of
        # a position's features all vanish, as on flat images they may. Here eps stands under the root.
        with _autocast_off(x):
            total = 0.0
            features = (self.net.net(self.net.scaling_layer(_at_least_float32(a))) for a in (x_hat, x))
            for f_hat, f, lin in zip(*features, self.net.lins):  # (B, C_l, H_l, W_l); VGG: five layers
                f_hat, f = (a * (a.square().sum(dim=1, keepdim=True) + 1e-10).rsqrt() for a in (f_hat, f))
                total = total + lin((f_hat - f).square()).mean(dim=(1, 2, 3))  # (B,)
            return total


def hinge_d_loss(real, fake):
    """Hinge loss of the discriminator: max(0, 1 - real) + max(0, 1 + fake), averaged: two logits -> ()."""
    return F.relu(1.0 - _at_least_float32(real)).mean() + F.relu(1.0 + _at_least_float32(fake)).mean()


def hinge_g_loss(fake):
    """Hinge loss of the generator: -fake, averaged: logits -> ()."""
    return -_at_least_float32(fake).mean()


def discriminator_loss(real_logits, fake_logits):
    """The discriminator's side of L_adv: the hinge on the global and on the per-pixel logits, added (Sec. 4.3)."""
    return sum(hinge_d_loss(real, fake) for real, fake in zip(real_logits, fake_logits))


def autoencoder_loss(output, image, weights=LOSS_WEIGHTS, perceptual=None, fake_logits=None):
    """Eq. 1, the autoencoder's side:  L_recon + lambda_reg L_reg + lambda_adv L_adv.

    lambda_adv is a constant: the adaptive weight of Eq. 2 brings nothing (Sec. 4.3, Table 8, Fig. 7).

    output       what LiteVAE(image) returned
    perceptual   an LPIPS, or None to go without
    fake_logits  the discriminator's (global, per-pixel) logits for output.sample, or None to go without
    Returns the total, (), and a dict of its unweighted terms plus "recon", the weighted L_recon.
    """
    terms = {"l1": l1_loss(output.sample, image)}
    # A term of weight 0 is not computed.
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
        terms["adv"] = sum(hinge_g_loss(fake) for fake in fake_logits)
        total = total + weights["adv"] * terms["adv"]
    return total, {**terms, "recon": recon}


def _at_least_float32(x):
    return x if x.dtype == torch.float64 else x.float()


def _autocast_off(x):
    return torch.autocast(x.device.type, enabled=False)


# ------------------------------------------------------------------------------------------------------
# 7  Discriminator (Sec. 4.3)
# ------------------------------------------------------------------------------------------------------


class UNetDiscriminator(nn.Module):
    """A UNet that judges the whole image and every pixel (Schonfeld et al., CVPR 2020; Sec. 4.3).

    (B, 3, H, W) -> (global_logits (B, 1), pixel_logits (B, 1, H, W)); positive means real. Four residual
    blocks down to H/16, whose mean gives the global logit, and four up again with skips. Spectral
    normalisation on every layer; no BatchNorm, which would tie the images of a batch together.
    """

    # Unspecified: its width and depth, and the CutMix consistency Schonfeld et al. add (left out: the paper
    # speaks of pixel-wise discrimination only). Width 64, as there.

    def __init__(self, channels=64, ch_multiplies=(1, 2, 4, 8)):
        super().__init__()
        widths = [channels * m for m in ch_multiplies]
        self.down = nn.ModuleList(DiscriminatorBlock(i, o) for i, o in zip([3] + widths, widths))
        self.to_global = _spectral_norm(nn.Linear(widths[-1], 1))
        self.up = nn.ModuleList()
        for i, o in zip(reversed(widths), list(reversed(widths[:-1])) + [channels]):
            self.up.append(DiscriminatorBlock(i if not self.up else 2 * i, o))  # doubled by the skip
        self.to_pixel = _spectral_norm(nn.Conv2d(channels, 1, 1))

    def forward(self, x):
        sizes, features = [], []
        for block in self.down:
            sizes.append(x.shape[-2:])
            x = F.avg_pool2d(block(x), 2)  # (B, channels * mult, H/2, W/2), then H/4, ...
            features.append(x)
        # Differs: Schonfeld et al. sum over positions; the mean keeps the logit's scale at any resolution.
        global_logits = self.to_global(F.leaky_relu(x, 0.2).mean(dim=(2, 3)))  # (B, 1)
        features.pop()
        for i, block in enumerate(self.up):
            if i > 0:
                x = torch.cat([x, features.pop()], dim=1)
            x = block(F.interpolate(x, size=sizes.pop(), mode="nearest"))
        return global_logits, self.to_pixel(F.leaky_relu(x, 0.2))  # (B, 1), (B, 1, H, W)


class DiscriminatorBlock(nn.Module):
    """Pre-activation residual block with spectral normalisation: (B, in, H, W) -> (B, out, H, W)."""

    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.conv_in = _spectral_norm(nn.Conv2d(in_channels, out_channels, 3, padding=1))
        self.conv_out = _spectral_norm(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.skip_connection = nn.Identity() if in_channels == out_channels else \
            _spectral_norm(nn.Conv2d(in_channels, out_channels, 1))

    def forward(self, x):
        h = x if x.shape[1] == 3 else F.leaky_relu(x, 0.2)  # pixels go in as they are
        return self.skip_connection(x) + self.conv_out(F.leaky_relu(self.conv_in(h), 0.2))


def _spectral_norm(module):
    return nn.utils.parametrizations.spectral_norm(module)


# ------------------------------------------------------------------------------------------------------
# 8  Presets and checkpoints (App. F)
# ------------------------------------------------------------------------------------------------------

# Paper: Tables 23 and 24, (model_channels, ch_multiplies) of the three extractors and of the aggregator.
# `params` counts the encoder at latent_dim=4; the paper prints 1.03 M, 6.75 M, 32.75 M, 41.42 M (Tables 2, 3).
PRESETS = {
    "S": {"extractor": (16, (1, 2, 2)), "aggregator": (16, (1, 2, 2)), "params": 1_035_692},
    "B": {"extractor": (32, (1, 2, 3)), "aggregator": (32, (1, 2, 3)), "params": 6_750_636},
    "M": {"extractor": (64, (1, 2, 4)), "aggregator": (32, (1, 2, 3)), "params": 32_750_124},
    "L": {"extractor": (64, (1, 2, 4)), "aggregator": (64, (1, 2, 4)), "params": 41_422_380},
}

CHECKPOINT_FORMAT = "litevae-1"


def save_checkpoint(path, vae, ema=None, **extra):
    """Write `vae` (a LiteVAE) and `extra` to `path`: tensors, numbers, strings, lists and dicts of them only.

    `ema` is a LiteVAE that holds averaged weights. ValueError for a fused model, whose SMC parameters are gone.
    """
    if vae.config.use_smc and not any(isinstance(m, SMC) for m in vae.modules()):
        raise ValueError("this model's SMCs were fused for inference: save it before calling fuse()")
    checkpoint = {"format": CHECKPOINT_FORMAT, "config": dict(vae.config), "model": dict(vae.state_dict())}
    if ema is not None:
        checkpoint["ema"] = dict(ema.state_dict())
    write_checkpoint(path, {**checkpoint, **extra})


def write_checkpoint(path, checkpoint):
    """Write a dict to `path`, so that a kill at any moment leaves the file that stood there before, whole."""
    # Beside it, flushed to disk, renamed over it.
    path = os.fspath(path)
    partial = path + ".partial"
    with open(partial, "wb") as file:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def load_checkpoint(path, format=CHECKPOINT_FORMAT):
    """The dict that was written to `path`, on the CPU. FileNotFoundError or ValueError, in one sentence.

    ValueError if the file is damaged, or holds a checkpoint of another format than `format`.
    """
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no checkpoint at {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()  # torch.load does not look at the archive's checksums
        checkpoint = torch.load(path, map_location="cpu", weights_only=True) if broken is None else None
    except Exception as error:
        raise ValueError(f"{path} is no checkpoint of this project, or it is damaged ({_one_line(error)})") from None
    if broken is not None:
        raise ValueError(f"{path} is damaged: the checksum of {broken} is wrong")
    held = checkpoint.get("format") if isinstance(checkpoint, dict) else None
    if held != format:
        raise ValueError(f"{path} is no LiteVAE checkpoint of format {format}" + (f" but of {held}" if held else ""))
    return checkpoint


def _one_line(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def main():
    """Print each size's parameter count beside the paper's, and the shapes an image goes through."""
    paper = {"S": "1.03 M", "B": "6.75 M", "M": "32.75 M", "L": "41.42 M"}
    count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731

    with torch.device("meta"):  # shapes without numbers: nothing is allocated or computed
        print("encoder     extractor (3x)     aggregator         parameters    paper (Tables 2, 3)")
        for size, preset in PRESETS.items():
            encoder = LiteVAEEncoder(4, preset["extractor"], preset["aggregator"])
            print(f"LiteVAE-{size}   {str(preset['extractor']):17}  {str(preset['aggregator']):15} "
                  f"{count(encoder):13,}    {paper[size]:>7}")
        print(f"SD decoder  128, (1, 2, 4, 4)                    {count(SDVAEDecoder()):12,}\n")

        vae, image = LiteVAE("B"), torch.empty(1, 3, 256, 256)
        enc, dec = vae.encoder, vae.decoder
        stages = [("extractor, level 1", enc.feature_extractor_L1), ("  pooled by 4", enc.downsample_block_L1),
                  ("extractor, level 2", enc.feature_extractor_L2), ("  pooled by 2", enc.downsample_block_L2),
                  ("extractor, level 3", enc.feature_extractor_L3), ("aggregator", enc.feature_aggregator),
                  ("decoder, middle", dec.mid.block_2),
                  *((f"decoder, up.{i}", dec.up[i].block[-1]) for i in (3, 2, 1, 0))]
        shapes = {}
        for name, module in stages:
            module.register_forward_hook(lambda module, args, out, name=name: shapes.update({name: out.shape}))
        shapes["image"] = image.shape
        for level, w in enumerate(vae.wavelet_fn.cascade(image), 1):
            shapes[f"wavelets, level {level}"] = w.shape
        latent = vae.encode(image).latent_dist.sample()
        shapes["latent"] = latent.shape
        shapes["reconstruction"] = vae.decode(latent).sample.shape
    print("One image through LiteVAE-B:")
    for name, shape in shapes.items():
        print(f"  {name:20} {tuple(shape)}")


# ======================================================================================================
# Part II: what the paper compares LiteVAE with. Nothing above uses it.
# ======================================================================================================


# ------------------------------------------------------------------------------------------------------
# 9  Baselines (Tables 2 and 3)
# ------------------------------------------------------------------------------------------------------


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
                stage.downsample = nn.Module()
                stage.downsample.conv = nn.Conv2d(width, width, 3, stride=2)
            self.down.append(stage)

        self.mid = nn.Module()
        self.mid.block_1 = SDResnetBlock(width, width)
        self.mid.attn_1 = SDAttnBlock(width)
        self.mid.block_2 = SDResnetBlock(width, width)

        self.norm_out = sd_norm(width)
        self.conv_out = nn.Conv2d(width, 2 * latent_dim, 3, padding=1)

    def forward(self, image):
        x = self.conv_in(image)  # (B, channels, H, W)
        for level, stage in enumerate(self.down):
            for block in stage.block:
                x = block(x)  # (B, channels * ch_mult[level], H_level, W_level)
            if level < len(self.down) - 1:
                x = stage.downsample.conv(F.pad(x, (0, 1, 0, 1)))  # padded on the right and below only
        x = self.mid.block_2(self.mid.attn_1(self.mid.block_1(x)))
        return self.conv_out(F.silu(self.norm_out(x)))  # (B, 2 latent_dim, h, w)


if __name__ == "__main__":
    main()
