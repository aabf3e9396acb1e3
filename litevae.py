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

That is LiteVAE. Part II holds what the paper compares it with, each a flag of train.py, and can be cut off:

    9  Baselines                  Tabs. 2, 3, 11-13    SDVAE, released_sd_vae, DWTVAE
   10  Other encoder parts        Tabs. 18-21          LiteVAEVariant, NAFNetExtractor, ViTAggregator
   11  Other losses               Tabs. 8, 14-16       adaptive_weight, ESRGANPerceptual, ldl_loss, logistic_d_loss
   12  Other discriminators       Tab. 10              PatchDiscriminator, StyleGANDiscriminator

Images are (B, 3, H, W) in [-1, 1], with H and W multiples of 8. The axes, here and everywhere below:
B images, C channels, H x W pixels, h x w = H/8 x W/8 latent positions, nz latent channels.

Remarks carry one of three tags:  # Paper:  where a line comes from;  # Differs:  from the paper's
pseudocode, and why;  # Unspecified:  the paper is silent, what was chosen here, and why.

    python litevae.py        prints the sizes, their parameter counts and the shapes on the way, then Part II's sizes
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
    # concatenations. The number is 32 wherever 32 is possible, else a smaller power of two.
    groups = next(g for g in (32, 16, 8, 4, 2, 1) if channels % g == 0 and (channels >= g * min_channels or g == 1))
    return GroupNorm(groups, channels, eps=1e-6)


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

    posterior = DiagonalGaussianDistribution

    def __init__(self, size="B", latent_dim=4, decoder_channels=128, use_smc=False, output_type="image",
                 use_1x1_conv=False, scaling_factor=1.0):
        super().__init__()
        if size not in PRESETS:
            raise ValueError(f"size must be one of {', '.join(PRESETS)}, got {size!r}")
        _check_arguments(latent_dim, decoder_channels, output_type)
        self.config = Config(size=size, latent_dim=latent_dim, decoder_channels=decoder_channels, use_smc=use_smc,
                             output_type=output_type, use_1x1_conv=use_1x1_conv, scaling_factor=scaling_factor)

        self.encoder = LiteVAEEncoder(latent_dim, PRESETS[size]["extractor"], PRESETS[size]["aggregator"])
        self.wavelet_fn = self.encoder.wavelet_fn
        self.decoder = build_decoder(latent_dim, decoder_channels, use_smc, output_type)
        self.pre_conv = nn.Conv2d(2 * latent_dim, 2 * latent_dim, 1) if use_1x1_conv else nn.Identity()
        self.post_conv = nn.Conv2d(latent_dim, latent_dim, 1) if use_1x1_conv else nn.Identity()
        self.apply(_initialise)
        # Photographs' wavelets are small: with this factor the means start with a std of about 1/2.
        _initialise_posterior(self.pre_conv if use_1x1_conv else self.encoder.feature_aggregator.out_layer, 4.0)

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
        return EncoderOutput(self.posterior(moments.to(self.dtype)))

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
        """The autoencoder stored in `path` by save_checkpoint, whichever of MODELS it is, in eval mode.

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
        config = checkpoint["config"]
        vae = MODELS[config.get("model", "litevae")](**config)
        vae.load_state_dict(checkpoint.get("ema", checkpoint["model"]) if ema else checkpoint["model"])
        return vae

    def fuse(self):
        """Fold every SMC into a plain convolution, in place, for inference; returns self. Same output."""
        return fuse_smc(self)

    @property
    def name(self):
        """How it is called in print: LiteVAE-B."""
        return f"LiteVAE-{self.config.size}"

    @property
    def dtype(self):
        return self.decoder.conv_in.weight.dtype

    @property
    def device(self):
        return self.decoder.conv_in.weight.device


def build_decoder(latent_dim, channels, use_smc, output_type):
    """Stable Diffusion's decoder for an image, (B, nz, h, w) -> (B, 3, H, W), or for wavelets, -> (B, 12, H/2, W/2)."""
    if output_type == "image":
        return SDVAEDecoder(latent_dim, channels, 3, (1, 2, 4, 4), use_smc=use_smc)
    # Unspecified: the decoder that predicts wavelets. Stable Diffusion's without its last stage, since the 12
    # bands live at half the resolution.
    return SDVAEDecoder(latent_dim, channels, 12, (2, 4, 4), use_smc=use_smc)


def _check_arguments(latent_dim, decoder_channels, output_type):
    if output_type not in ("image", "wavelet"):
        raise ValueError(f'output_type must be "image" or "wavelet", got {output_type!r}')
    if latent_dim < 1 or decoder_channels < 1:
        raise ValueError(f"latent_dim and decoder_channels must be 1 or more, got {latent_dim}, {decoder_channels}")


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
def _initialise_posterior(conv, factor):
    """Means `factor` times as large, and a posterior std of e^-3 = 0.05 everywhere."""
    mean, logvar = conv.weight.chunk(2)
    mean.mul_(factor)
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
        # slice1, slice2, ...: the package numbers their layers as torchvision's `features` does.
        load_torchvision_features(self.net.net.children(), self.trunks[net], "LPIPS")
        self.requires_grad_(False).eval()

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


def load_torchvision_features(modules, file, who):
    """Load the `features.` tensors of a torchvision model into modules whose layers bear its numbers.

    `file` is looked for in torch's hub cache, else downloaded. FileNotFoundError, which names it and `who`
    needs it, if neither works.
    """
    path = os.path.join(torch.hub.get_dir(), "checkpoints", file)
    url = f"https://download.pytorch.org/models/{file}"
    try:
        if not os.path.exists(path):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            torch.hub.download_url_to_file(url, path, hash_prefix=file.split("-")[-1].removesuffix(".pth"))
        tensors = torch.load(path, map_location="cpu", weights_only=True)
        for module in modules:
            module.load_state_dict({name: tensors[f"features.{name}"] for name in module.state_dict()})
    except Exception as error:
        raise FileNotFoundError(f"{who} needs the weights {url}: put the file at {path} "
                                f"(loading it failed with: {_one_line(error)})") from None


def hinge_d_loss(real, fake):
    """Hinge loss of the discriminator: max(0, 1 - real) + max(0, 1 + fake), averaged: two logits -> ()."""
    return F.relu(1.0 - _at_least_float32(real)).mean() + F.relu(1.0 + _at_least_float32(fake)).mean()


def hinge_g_loss(fake):
    """Hinge loss of the generator: -fake, averaged: logits -> ()."""
    return -_at_least_float32(fake).mean()


def discriminator_loss(real_logits, fake_logits, d_loss=hinge_d_loss):
    """The discriminator's side of L_adv: `d_loss` on the global and on the per-pixel logits, added (Sec. 4.3)."""
    return sum(d_loss(real, fake) for real, fake in zip(real_logits, fake_logits))


def autoencoder_loss(output, image, weights=LOSS_WEIGHTS, perceptual=None, fake_logits=None, g_loss=hinge_g_loss):
    """Eq. 1, the autoencoder's side:  L_recon + lambda_reg L_reg + lambda_adv L_adv.

    lambda_adv is a constant: the adaptive weight of Eq. 2 brings nothing (Sec. 4.3, Table 8, Fig. 7).

    output       what LiteVAE(image) returned
    perceptual   an LPIPS, or None to go without
    fake_logits  the discriminator's (global, per-pixel) logits for output.sample, or None to go without
    g_loss       what the generator loses on each of them
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
        terms["adv"] = sum(g_loss(fake) for fake in fake_logits)
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

# What a checkpoint's config may name as its "model", and functions that make a checkpoint of another project's
# file (or return None). Part II enters more.
MODELS = {"litevae": LiteVAE}
IMPORTERS = []


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

    ValueError if the file is damaged, or holds a checkpoint of another format than `format` that no importer knows.
    """
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no checkpoint at {path}")
    try:
        return _load_own(path, format)
    except ValueError:
        for importer in IMPORTERS if format == CHECKPOINT_FORMAT else ():
            checkpoint = importer(path)
            if checkpoint is not None:
                return checkpoint
        raise


def _load_own(path, format):
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


if __name__ == "__main__":
    main()


# ======================================================================================================
# Part II: what the paper compares LiteVAE with. Nothing above uses it.
# ======================================================================================================
# Each is a flag of train.py and trains; the README has a row for each table, with the commands.

import json  # noqa: E402  Part I needs neither
import re    # noqa: E402


# ------------------------------------------------------------------------------------------------------
# 9  Baselines (Tables 2, 3, 11 to 13)
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
        x = self.conv_in(image.to(self.conv_in.weight.dtype))  # (B, channels, H, W)
        for level, stage in enumerate(self.down):
            for block in stage.block:
                x = block(x)  # (B, channels * ch_mult[level], H_level, W_level)
            if level < len(self.down) - 1:
                x = stage.downsample.conv(F.pad(x, (0, 1, 0, 1)))  # padded on the right and below only
        x = self.mid.block_2(self.mid.attn_1(self.mid.block_1(x)))
        return self.conv_out(F.silu(self.norm_out(x)))  # (B, 2 latent_dim, h, w)


# Unspecified: the layout of VAE-Small, of which the paper gives the 6.75 M parameters alone. A narrower Stable
# Diffusion encoder has them at no width; this one also grows more evenly. `params` counts at latent_dim=4.
SD_ENCODERS = {
    "sd-vae": {"channels": 128, "ch_mult": (1, 2, 4, 4), "params": 34_163_592},
    "vae-small": {"channels": 56, "ch_mult": (2, 3, 3, 4), "params": 6_757_584},
}


class SDVAE(LiteVAE):
    """The Stable Diffusion autoencoder, and the same with a small encoder, behind LiteVAE's interface (Table 2).

    model   "sd-vae" or "vae-small", see SD_ENCODERS; the other arguments are LiteVAE's

    With "sd-vae" and the defaults the state dict is that of the released kl-f8 checkpoints, name by name.
    """

    def __init__(self, model="sd-vae", latent_dim=4, decoder_channels=128, use_smc=False, output_type="image",
                 scaling_factor=1.0):
        nn.Module.__init__(self)  # LiteVAE lends its methods, not its parts
        if model not in SD_ENCODERS:
            raise ValueError(f"model must be one of {', '.join(SD_ENCODERS)}, got {model!r}")
        _check_arguments(latent_dim, decoder_channels, output_type)
        self.config = Config(model=model, latent_dim=latent_dim, decoder_channels=decoder_channels, use_smc=use_smc,
                             output_type=output_type, scaling_factor=scaling_factor)
        preset = SD_ENCODERS[model]
        self.encoder = SDVAEEncoder(latent_dim, preset["channels"], preset["ch_mult"])
        self.decoder = build_decoder(latent_dim, decoder_channels, use_smc, output_type)
        self.wavelet_fn = HaarTransform()
        self.quant_conv = nn.Conv2d(2 * latent_dim, 2 * latent_dim, 1)
        self.post_quant_conv = nn.Conv2d(latent_dim, latent_dim, 1)
        self.apply(_initialise)  # as LiteVAE's: the comparison is about the encoders
        _initialise_posterior(self.quant_conv, 1.0)

    # encode and decode know these convolutions by App. G's names.
    pre_conv = property(lambda self: self.quant_conv)
    post_conv = property(lambda self: self.post_quant_conv)
    name = property(lambda self: {"sd-vae": "SD-VAE", "vae-small": "VAE-Small"}[self.config.model])


# diffusers' names for tensors of its AutoencoderKL -> the released checkpoints'; the second of two is an older name.
DIFFUSERS_NAMES = [
    (r"mid_block\.resnets\.0\.", "mid.block_1."),
    (r"mid_block\.resnets\.1\.", "mid.block_2."),
    (r"mid_block\.attentions\.0\.group_norm\.", "mid.attn_1.norm."),
    (r"mid_block\.attentions\.0\.(to_out\.0|proj_attn)\.", "mid.attn_1.proj_out."),
    (r"mid_block\.attentions\.0\.(to_q|query)\.", "mid.attn_1.q."),
    (r"mid_block\.attentions\.0\.(to_k|key)\.", "mid.attn_1.k."),
    (r"mid_block\.attentions\.0\.(to_v|value)\.", "mid.attn_1.v."),
    (r"down_blocks\.(\d)\.", r"down.\1."),
    (r"up_blocks\.(\d)\.", lambda found: f"up.{3 - int(found[1])}."),  # counted from the other end
    (r"resnets\.(\d)\.", r"block.\1."),
    (r"(down|up)samplers\.0\.", r"\1sample."),
    (r"conv_shortcut\.", "nin_shortcut."),
    (r"conv_norm_out\.", "norm_out."),
]


def released_sd_vae(path):
    """A released Stable Diffusion autoencoder (kl-f8) as a checkpoint of this project, or None if `path` holds none.

    CompVis's names, bare or behind "first_stage_model." in a whole diffusion model, or diffusers'; written by torch
    or as safetensors, in any precision. ValueError if it is an autoencoder of another layout. (SDXL's has the same:
    for that set `config.scaling_factor` to 0.13025.)
    """
    tensors = read_tensors(path)
    if any(name.startswith("first_stage_model.") for name in tensors):
        tensors = {name.removeprefix("first_stage_model."): tensor for name, tensor in tensors.items()
                   if name.startswith("first_stage_model.")}
    if not {"encoder.conv_in.weight", "decoder.conv_in.weight"} <= tensors.keys():
        return None
    state = {}
    for name, tensor in tensors.items():
        for theirs, ours in DIFFUSERS_NAMES:
            name = re.sub(theirs, ours, name)
        if ".attn_1." in name and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]  # diffusers' linear layers are 1x1 convolutions here
        if not name.startswith(("loss.", "model_ema.")):  # CompVis's discriminator, LPIPS, averaged weights
            state[name] = tensor

    # 0.18215 is what Stable Diffusion multiplies these latents by.
    config = {"model": "sd-vae", "latent_dim": len(state["decoder.conv_in.weight"][0]),
              "decoder_channels": len(state.get("decoder.norm_out.weight", range(128))),
              "use_smc": False, "output_type": "image", "scaling_factor": 0.18215}
    with torch.device("meta"):
        expected = SDVAE(**config).state_dict()
    for name in [*expected, *state]:
        found, right = (f"{name} of shape {tuple(d[name].shape)}" if name in d else f"no {name}"
                        for d in (state, expected))
        if found != right:
            raise ValueError(f"{path} holds an autoencoder, but not Stable Diffusion's kl-f8: it has {found}, and "
                             f"kl-f8 has {right}")
    return {"format": CHECKPOINT_FORMAT, "config": config, "model": state}


def read_tensors(path):
    """{name: tensor} of a file by torch, its "state_dict" if it has one, or of a .safetensors; {} if it is neither."""
    try:
        with open(path, "rb") as file:
            start = file.read(9)
            if start[8:] == b"{":  # safetensors: the header's length in 8 bytes, the header in JSON, the numbers
                return _read_safetensors(file)
        # Old checkpoints pickle objects of the program that trained them. No code of a file is run here: whatever
        # is not a tensor or a plain value becomes an empty Placeholder.
        foreign = []
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if archive.testzip() is not None:
                    return {}
            foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        with torch.serialization.safe_globals([(Placeholder, name) for name in foreign]):
            content = torch.load(path, map_location="cpu", weights_only=True)
        content = content.get("state_dict", content)
        return {name: value for name, value in content.items() if isinstance(name, str) and torch.is_tensor(value)}
    except Exception:  # a damaged file, or one of another kind
        return {}


class Placeholder:
    """What a checkpoint's pickled objects become: nothing."""

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass

    def __setitem__(self, key, value):
        pass


def _read_safetensors(file):
    dtypes = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    file.seek(0)
    header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    origin, tensors = file.tell(), {}
    for name, entry in header.items():
        if entry.get("dtype") in dtypes:
            first, last = entry["data_offsets"]
            file.seek(origin + first)
            numbers = torch.frombuffer(bytearray(file.read(last - first)), dtype=dtypes[entry["dtype"]])
            tensors[name] = numbers.view(entry["shape"])
    return tensors


class DWTEncoder(nn.Module):
    """The encoder that learns nothing (App. B): (B, 3, H, W) -> (B, 24, h, w) or (B, 96, h, w), half of them zero.

    The first half, the latent, holds the four bands of level 3 (nz = 12), and with `higher_bands` also those of
    level 2 but L, by space-to-depth (nz = 48); the second, where others have a log-variance, nothing.
    """

    # Paper: App. B, Tables 11 and 12. 48 = 12 + 4 * 9 says which "higher frequency sub-bands" DWT-2 adds: with
    # level 1's nine, 16 times each, it would be 192.

    def __init__(self, higher_bands):
        super().__init__()
        self.wavelet_fn, self.higher_bands = HaarTransform(), higher_bands

    def forward(self, image):
        _, dwt_L2, dwt_L3 = (w / 2**l for l, w in enumerate(self.wavelet_fn.cascade(image), 1))
        latent = dwt_L3  # (B, 12, h, w)
        if self.higher_bands:
            details = F.pixel_unshuffle(dwt_L2[:, 3:], 2)  # (B, 9, 2h, 2w) -> (B, 36, h, w)
            latent = torch.cat([latent, details], dim=1)  # (B, 48, h, w)
        return torch.cat([latent, torch.zeros_like(latent)], dim=1)


class PointDistribution(DiagonalGaussianDistribution):
    """A "posterior" without spread: every draw is the mean, and there is no KL."""

    def __init__(self, parameters):
        super().__init__(parameters)
        self.std, self.logvar = torch.zeros_like(self.mean), torch.full_like(self.mean, -torch.inf)

    def kl(self):
        return self.mean.new_zeros(len(self.mean))


DWT_LATENTS = {"dwt": 12, "dwt-2": 48}


class DWTVAE(LiteVAE):
    """A wavelet transform for an encoder, and Stable Diffusion's decoder, which alone is trained (App. B).

    model   "dwt" (nz = 12) or "dwt-2" (nz = 48); the other arguments are LiteVAE's
    """

    posterior = PointDistribution

    def __init__(self, model="dwt", latent_dim=None, decoder_channels=128, use_smc=False, output_type="image",
                 scaling_factor=1.0):
        nn.Module.__init__(self)
        if model not in DWT_LATENTS:
            raise ValueError(f"model must be one of {', '.join(DWT_LATENTS)}, got {model!r}")
        latent_dim = latent_dim or DWT_LATENTS[model]
        if latent_dim != DWT_LATENTS[model]:
            raise ValueError(f"the latent of {model} has {DWT_LATENTS[model]} channels, not {latent_dim}")
        _check_arguments(latent_dim, decoder_channels, output_type)
        self.config = Config(model=model, latent_dim=latent_dim, decoder_channels=decoder_channels, use_smc=use_smc,
                             output_type=output_type, scaling_factor=scaling_factor)
        self.encoder = DWTEncoder(higher_bands=model == "dwt-2")
        self.decoder = build_decoder(latent_dim, decoder_channels, use_smc, output_type)
        self.wavelet_fn = self.encoder.wavelet_fn
        self.pre_conv = self.post_conv = nn.Identity()
        self.apply(_initialise)

    name = property(lambda self: self.config.model.upper())


# ------------------------------------------------------------------------------------------------------
# 10  Other encoder parts (Tables 18 to 21)
# ------------------------------------------------------------------------------------------------------


class LiteVAEVariant(LiteVAE):
    """LiteVAE with parts of its encoder exchanged (App. D.3 to D.6); all else, forward included, is LiteVAE's.

    extractor          "unet", or "nafnet" (Table 18)
    shared_extractor   one extractor reads all levels (Table 19)
    aggregator         "unet", or "vit" (Table 20), which takes images of `resolution` x `resolution` alone
    last_two_levels    the extractors read levels 2 and 3 only (Table 21)
    the other arguments are LiteVAE's
    """

    def __init__(self, *, model="litevae-variant", extractor="unet", shared_extractor=False, aggregator="unet",
                 last_two_levels=False, resolution=None, **arguments):
        if extractor not in ("unet", "nafnet") or aggregator not in ("unet", "vit"):
            raise ValueError('extractor must be "unet" or "nafnet" and aggregator "unet" or "vit", '
                             f"got {extractor!r} and {aggregator!r}")
        if (aggregator == "vit") != (resolution is not None):
            raise ValueError("the ViT aggregator needs the resolution of its images, and no other part does")
        super().__init__(**arguments)
        self.config.update(model=model, extractor=extractor, shared_extractor=shared_extractor, aggregator=aggregator,
                           last_two_levels=last_two_levels, resolution=resolution)
        # Made last, so that one seed gives every variant the same decoder to start from.
        encoder, bands, moments = self.encoder, 12, 2 * self.config.latent_dim
        levels = (2, 3) if last_two_levels else (1, 2, 3)
        if extractor == "nafnet":
            for level in levels:
                setattr(encoder, f"feature_extractor_L{level}", NAFNetExtractor(bands, *NAFNETS[self.config.size]))
        if last_two_levels:
            encoder.feature_extractor_L1, encoder.downsample_block_L1 = nn.Identity(), NoFeatures()
            encoder.feature_aggregator = LiteVAEUNetBlock(2 * bands, moments, *PRESETS[self.config.size]["aggregator"])
        if shared_extractor:
            for level in levels:
                setattr(encoder, f"feature_extractor_L{level}", encoder.feature_extractor_L3)
        if aggregator == "vit":
            model_channels, ch_multiplies = PRESETS[self.config.size]["aggregator"]
            encoder.feature_aggregator = ViTAggregator(len(levels) * bands, moments, resolution // 8,
                                                       model_channels * ch_multiplies[-1])
        encoder.apply(_initialise)
        if aggregator == "vit" and self.config.use_1x1_conv:
            _initialise_posterior(self.pre_conv, 0.5 / 4.0)  # which has its 4 already
        elif not self.config.use_1x1_conv:
            # A ViT ends in a norm: its output is not small.
            _initialise_posterior(encoder.feature_aggregator.out_layer, 0.5 if aggregator == "vit" else 4.0)

    @property
    def name(self):
        c = self.config
        parts = {"NAFNet extractor": c.extractor == "nafnet", "one for all levels": c.shared_extractor,
                 "ViT aggregator": c.aggregator == "vit", "last two levels": c.last_two_levels}
        return f"{super().name} ({', '.join(part for part, there in parts.items() if there)})"


class NoFeatures(nn.Module):
    """What level 1 contributes when only the last two are read: (B, C, H/2, W/2) -> (B, 0, h, w)."""

    def forward(self, x):
        return x[:, :0, ::4, ::4]


# Unspecified: NAFNet's size. (channels, blocks): as wide as the UNet's widest blocks, and as many as come nearest
# to its parameters, so that Table 18 compares kinds of network: 261,900, 1,712,844 and 10,333,964 parameters.
NAFNETS = {"S": (32, 31), "B": (96, 25), "M": (256, 22), "L": (256, 22)}


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

    # Paper: Table 20, 0.84 M parameters, beside a UNet of 1.69 M. Unspecified: all else. One token a position;
    # seven blocks as wide as the UNet's widest, with a 3x3 convolution before and a 1x1 after, have 841,176 at
    # nz = 12 and 16x16 positions, which is where Table 20's numbers come from (it shares Table 2a's rFID).

    def __init__(self, in_channels, out_channels, side, width, depth=7):
        super().__init__()
        self.in_layer = nn.Conv2d(in_channels, width, 3, padding=1)
        self.positions = nn.Parameter(0.02 * torch.randn(1, side * side, width))
        self.blocks = nn.Sequential(*(ViTBlock(width) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.out_layer = nn.Conv2d(width, out_channels, 1)

    def forward(self, x):
        B, _, h, w = x.shape
        side = math.isqrt(self.positions.shape[1])
        if (h, w) != (side, side):
            raise ValueError(f"this model's ViT aggregator takes images of {8 * side}x{8 * side} alone (Table 20), "
                             f"got {8 * h}x{8 * w}")
        x = self.in_layer(x).flatten(2).transpose(1, 2) + self.positions  # (B, hw, width)
        x = self.norm(self.blocks(x)).transpose(1, 2).reshape(B, -1, h, w)  # (B, width, h, w)
        return self.out_layer(x)


class ViTBlock(nn.Module):
    """Pre-norm transformer block (Dosovitskiy et al. 2021), heads of 32 channels: (B, N, C) -> (B, N, C)."""

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


MODELS |= {"litevae-variant": LiteVAEVariant, "sd-vae": SDVAE, "vae-small": SDVAE, "dwt": DWTVAE, "dwt-2": DWTVAE}
IMPORTERS += [released_sd_vae]


# ------------------------------------------------------------------------------------------------------
# 11  Other losses (Eq. 2, Tables 8 and 14 to 16)
# ------------------------------------------------------------------------------------------------------


def adaptive_weight(recon, adv, last_layer, delta=1e-4, average=lambda gradient: gradient):
    """lambda_adv of Eq. 2:  1/2 ||grad L_recon|| / (||grad L_adv|| + delta), gradients at `last_layer`: a () constant.

    `recon` and `adv` are losses, (), whose graph is kept; `last_layer` is the decoder's last weight; `average`
    averages a gradient over the processes that share a batch.
    """
    # Unspecified: where the gradients are taken, delta, and a ceiling. As in taming-transformers.
    g_recon, g_adv = (average(torch.autograd.grad(loss, last_layer, retain_graph=True)[0]).norm()
                      for loss in (recon, adv))
    return 0.5 * (g_recon / (g_adv + delta)).clamp(max=1e4)


class ESRGANPerceptual(nn.Module):
    """ESRGAN's perceptual loss (Wang et al. 2018, Table 14): two (B, 3, H, W) in [-1, 1] -> (B,).

    L1 between features of VGG-19's conv5_4 before their activation, so that most of them are not zero. Frozen,
    in float32. The weights, torchvision's, are looked for as LPIPS's are. H and W at least 16.
    """

    weights = "vgg19-dcbb9e9d.pth"

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
        load_torchvision_features([self.features], self.weights, "the ESRGAN loss")
        self.requires_grad_(False)

    def forward(self, x_hat, x):
        with _autocast_off(x):
            f_hat, f = (self.features(((a.float() + 1) / 2 - self.mean) / self.std) for a in (x_hat, x))
            return (f_hat - f).abs().mean(dim=(1, 2, 3))  # of (B, 512, H/16, W/16)


def ldl_loss(x_hat, x, x_ema):
    """Locally discriminative learning (Liang et al. 2022, Table 15): three (B, 3, H, W) in [-1, 1] -> ().

    L1, weighted by where x_hat is likely to hold artifacts; `x_ema` is what the averaged weights make of x.
    """
    # Over [0, 1], as in its authors' code: on [-1, 1] the same loss would be 10 times as large.
    x_hat, x, x_ema = ((_at_least_float32(a) + 1) / 2 for a in (x_hat, x, x_ema))
    return (artifact_map(x_hat.detach(), x, x_ema) * (x_hat - x)).abs().mean()


def artifact_map(x_hat, x, x_ema, kernel_size=7):
    """LDL's refined map M of three (B, 3, H, W) in [0, 1]: (B, 1, H, W), zero where the averaged weights do worse.

    The variance of the residual in each 7x7 window, times its variance in the image to the power of 1/5.
    """
    # Differs: the authors' code lets the gradient run through the map too, where the fifth root's is infinite for
    # a perfect reconstruction. A weight is a constant here.
    residual, residual_ema = ((a - x).abs().sum(dim=1, keepdim=True) for a in (x_hat, x_ema))  # (B, 1, H, W)
    half = kernel_size // 2
    windows = F.unfold(F.pad(residual, (half,) * 4, mode="reflect"), kernel_size)  # (B, 49, HW)
    local = windows.var(dim=1).view_as(residual)  # (B, 1, H, W)
    whole = residual.var(dim=(1, 2, 3), keepdim=True) ** 0.2  # (B, 1, 1, 1)
    return torch.where(residual < residual_ema, 0.0, whole * local)


def logistic_d_loss(real, fake):
    """Logistic loss of the discriminator: softplus(-real) + softplus(fake), averaged: two logits -> () (Table 16)."""
    return F.softplus(-_at_least_float32(real)).mean() + F.softplus(_at_least_float32(fake)).mean()


def logistic_g_loss(fake):
    """Non-saturating logistic loss of the generator: softplus(-fake), averaged: logits -> () (Table 16)."""
    return F.softplus(-_at_least_float32(fake)).mean()


# ------------------------------------------------------------------------------------------------------
# 12  Other discriminators (Table 10)
# ------------------------------------------------------------------------------------------------------
# Like UNetDiscriminator they return a tuple of logits, positive for real.


class PatchDiscriminator(nn.Module):
    """pix2pix's PatchGAN, which Stable Diffusion's autoencoder was trained with: (B, 3, H, W) -> ((B, 1, H', W'),).

    Each logit judges 70x70 pixels; H' = H/8 - 2. H and W at least 24.
    """

    # Differs: taming-transformers' has BatchNorm, which ties the images of a batch together and breaks at batch 1.
    # Spectral normalisation, as in the UNet: Table 10 is about what a discriminator looks at.

    def __init__(self, channels=64):
        super().__init__()
        layers, width = [], 3
        for out, stride in ((channels, 2), (2 * channels, 2), (4 * channels, 2), (8 * channels, 1)):
            layers += [_spectral_norm(nn.Conv2d(width, out, 4, stride, padding=1)), nn.LeakyReLU(0.2)]
            width = out
        self.layers = nn.Sequential(*layers, _spectral_norm(nn.Conv2d(width, 1, 4, padding=1)))

    def forward(self, x):
        return (self.layers(x),)


class StyleGANDiscriminator(nn.Module):
    """StyleGAN2's residual discriminator (Karras et al. 2020): (B, 3, R, R) -> ((B, 1),), R a power of two.

    Equalised learning rate; blurs before it downsamples; the last block sees how much a group of images varies.
    B is a multiple of 4, the size of such a group.
    """

    # Unspecified: its width (here `channels` at full resolution, doubled at each halving up to 512; the original
    # has 128 at 256x256), and whether its R1 penalty is used: it is not, as for the others.

    def __init__(self, resolution, channels=64):
        super().__init__()
        if resolution < 8 or resolution & (resolution - 1):
            raise ValueError(f"StyleGAN2's discriminator takes images of a power of two, got {resolution}")
        self.resolution, width = resolution, channels
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
        if x.shape[2:] != (self.resolution, self.resolution):
            raise ValueError(f"this StyleGAN2 discriminator judges images of {self.resolution}x{self.resolution} "
                             f"alone, got {x.shape[2]}x{x.shape[3]}")
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

    def forward(self, x):
        h = scaled_leaky_relu(self.conv_in(x))
        h = scaled_leaky_relu(self.conv_out(binomial_blur(h, 2)))  # (B, in, H + 1, W + 1) -> (B, out, H/2, W/2)
        return (self.skip_connection(binomial_blur(x, 1)) + h) / math.sqrt(2)


class EqualizedConv2d(nn.Conv2d):
    """A convolution with weights drawn at unit variance and scaled where they are used (Karras et al. 2018)."""

    # So that Adam, whose steps do not depend on a gradient's scale, changes all layers at the same relative speed:
    # a slow one at the rates that suit the other discriminators (StyleGAN2's own is 0.002).

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


def binomial_blur(x, padding):
    """Blur by (1, 3, 3, 1) / 8 along both axes: (B, C, H, W) -> (B, C, H + 2 padding - 3, W + 2 padding - 3)."""
    C = x.shape[1]
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0], device=x.device, dtype=x.dtype) / 8
    kernel = (taps[:, None] * taps).expand(C, 1, 4, 4)
    return F.conv2d(x, kernel, padding=padding, groups=C)


def minibatch_stddev(x, group_size=4):
    """How much the images of a group differ, as a map to append: (B, C, H, W) -> (B, 1, H, W), in float32.

    The standard deviation over each group, at every position of every channel, averaged over both.
    """
    # Differs: StyleGAN2 spreads a group over the batch. Neighbours here: a batch of real images followed by fake
    # ones can then be judged at once, without a group of both.
    B, C, H, W = x.shape
    if B % group_size:
        raise ValueError(f"StyleGAN2's discriminator takes batches that are multiples of {group_size}, got {B} images")
    groups = x.float().view(B // group_size, group_size, C, H, W)
    std = (groups.var(dim=1, unbiased=False) + 1e-8).sqrt()  # (B / group_size, C, H, W)
    return std.mean(dim=(1, 2, 3)).repeat_interleave(group_size).view(B, 1, 1, 1).expand(B, 1, H, W)


def compare():
    """Print Part II's sizes beside the paper's."""
    count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    with torch.device("meta"):
        sd, small, dwt = SDVAE("sd-vae"), SDVAE("vae-small"), DWTVAE("dwt")
        naf, one = LiteVAEVariant(extractor="nafnet"), LiteVAEVariant(shared_extractor=True)
        vit = LiteVAEVariant(aggregator="vit", resolution=128, latent_dim=12)
        rows = [("SD-VAE encoder", sd.encoder, "34.16 M"), ("SD-VAE decoder", sd.decoder, ""),
                ("VAE-Small encoder", small.encoder, "6.75 M"), ("DWT encoder", dwt.encoder, "0"),
                ("UNet aggregator (B)", LiteVAE("B", 12).encoder.feature_aggregator, "1.69 M"),
                ("ViT aggregator (B)", vit.encoder.feature_aggregator, "0.84 M"),
                ("encoder, NAFNet (B)", naf.encoder, ""), ("encoder, shared (B)", one.encoder, ""),
                ("UNet discriminator", UNetDiscriminator(), ""), ("PatchGAN", PatchDiscriminator(), ""),
                ("StyleGAN2's, 128x128", StyleGANDiscriminator(128), "")]
    print("\nWhat the paper compares with:")
    for name, module, paper in rows:
        print(f"  {name:22} {count(module):12,}    {paper:>7}".rstrip())


if __name__ == "__main__":
    compare()
