"""What the authors' checkpoints hold: the tensors of CompVis' code by name and shape.

diffusers' conversion takes whatever tensors it is given. This list of what must be there lets an
import name a missing, surplus or misshapen tensor as the checkpoint names it. It follows the
constructors in CompVis/latent-diffusion: ``openaimodel.UNetModel``, ``diffusionmodules.model`` and
``modules.attention``; the tests hold it against the key list of the real model (688 tensors).
"""

from collections.abc import Iterator
from dataclasses import dataclass

Shape = tuple[int, ...]

UNET_PREFIX = "model.diffusion_model."
FIRST_STAGE_PREFIX = "first_stage_model."
CONDITIONER_PREFIX = "cond_stage_model."


@dataclass(frozen=True, kw_only=True)
class LdmUNet:
    """Arguments of CompVis' ``UNetModel``.

    Attributes:
        in_channels: Latent channels.
        out_channels: The same.
        model_channels: Channels at multiplier 1.
        channel_mult: One per level, finest first.
        num_res_blocks: Per level.
        attention_resolutions: Downsampling factors at which blocks attend.
        num_heads: None if ``num_head_channels`` decides.
        num_head_channels: None if ``num_heads`` decides.
        transformer_depth: Layers of an attention block.
        context_dim: Channels of a context token.
    """

    in_channels: int
    out_channels: int
    model_channels: int
    channel_mult: tuple[int, ...]
    num_res_blocks: int
    attention_resolutions: tuple[int, ...]
    num_heads: int | None
    num_head_channels: int | None
    transformer_depth: int
    context_dim: int

    @property
    def block_out_channels(self) -> tuple[int, ...]:
        """Channels of each level, finest first."""
        return tuple(self.model_channels * factor for factor in self.channel_mult)

    @property
    def attention(self) -> tuple[bool, ...]:
        """Whether the blocks of a level attend, finest first."""
        return tuple(
            2**level in self.attention_resolutions for level in range(len(self.channel_mult))
        )

    def heads(self, channels: int) -> int:
        """Attention heads of a block with so many channels."""
        if self.num_heads is not None:
            return self.num_heads
        assert self.num_head_channels is not None
        return channels // self.num_head_channels


@dataclass(frozen=True, kw_only=True)
class LdmFirstStage:
    """Arguments of CompVis' ``VQModelInterface`` or ``AutoencoderKL``.

    Attributes:
        kind: "vq" or "kl".
        embed_dim: Latent channels.
        z_channels: Channels before ``quant_conv``.
        codes: Entries of the codebook; 0 for "kl".
        in_channels: Image channels.
        out_channels: Image channels.
        channels: Channels at multiplier 1.
        channel_mult: One per level, finest first.
        num_res_blocks: Per level.
        attention: Whether a level attends, finest first.
    """

    kind: str
    embed_dim: int
    z_channels: int
    codes: int
    in_channels: int
    out_channels: int
    channels: int
    channel_mult: tuple[int, ...]
    num_res_blocks: int
    attention: tuple[bool, ...]

    @property
    def block_out_channels(self) -> tuple[int, ...]:
        """Channels of each level, finest first."""
        return tuple(self.channels * factor for factor in self.channel_mult)


def unet_shapes(unet: LdmUNet) -> dict[str, Shape]:
    """Name -> shape of every tensor of the UNet, with ``UNET_PREFIX``."""
    shapes = dict(_unet_shapes(unet))
    return {f"{UNET_PREFIX}{name}": shape for name, shape in shapes.items()}


def _unet_shapes(unet: LdmUNet) -> Iterator[tuple[str, Shape]]:
    base, time = unet.model_channels, 4 * unet.model_channels
    levels = len(unet.channel_mult)
    yield from _layer("time_embed.0", (time, base))
    yield from _layer("time_embed.2", (time, time))
    yield from _layer("input_blocks.0.0", (base, unet.in_channels, 3, 3))
    channels, skips, index = base, [base], 1
    for level, width in enumerate(unet.block_out_channels):
        for _ in range(unet.num_res_blocks):
            block = f"input_blocks.{index}"
            yield from _residual(f"{block}.0", channels, width, time)
            channels = width
            if unet.attention[level]:
                yield from _transformer(f"{block}.1", channels, unet)
            skips.append(channels)
            index += 1
        if level < levels - 1:
            yield from _layer(f"input_blocks.{index}.0.op", (channels, channels, 3, 3))
            skips.append(channels)
            index += 1
    yield from _residual("middle_block.0", channels, channels, time)
    yield from _transformer("middle_block.1", channels, unet)
    yield from _residual("middle_block.2", channels, channels, time)
    index = 0
    for level, width in reversed(list(enumerate(unet.block_out_channels))):
        for layer in range(unet.num_res_blocks + 1):
            block = f"output_blocks.{index}"
            yield from _residual(f"{block}.0", channels + skips.pop(), width, time)
            channels = width
            if unet.attention[level]:
                yield from _transformer(f"{block}.1", channels, unet)
            if level and layer == unet.num_res_blocks:
                place = 2 if unet.attention[level] else 1
                yield from _layer(f"{block}.{place}.conv", (channels, channels, 3, 3))
            index += 1
    yield from _norm("out.0", channels)
    yield from _layer("out.2", (unet.out_channels, base, 3, 3))


def _residual(name: str, before: int, after: int, time: int) -> Iterator[tuple[str, Shape]]:
    yield from _norm(f"{name}.in_layers.0", before)
    yield from _layer(f"{name}.in_layers.2", (after, before, 3, 3))
    yield from _layer(f"{name}.emb_layers.1", (after, time))
    yield from _norm(f"{name}.out_layers.0", after)
    yield from _layer(f"{name}.out_layers.3", (after, after, 3, 3))
    if before != after:
        yield from _layer(f"{name}.skip_connection", (after, before, 1, 1))


def _transformer(name: str, channels: int, unet: LdmUNet) -> Iterator[tuple[str, Shape]]:
    heads = unet.heads(channels)
    inner = heads * (channels // heads)
    yield from _norm(f"{name}.norm", channels)
    yield from _layer(f"{name}.proj_in", (inner, channels, 1, 1))
    for depth in range(unet.transformer_depth):
        block = f"{name}.transformer_blocks.{depth}"
        for attention, source in (("attn1", inner), ("attn2", unet.context_dim)):
            yield f"{block}.{attention}.to_q.weight", (inner, inner)
            yield f"{block}.{attention}.to_k.weight", (inner, source)
            yield f"{block}.{attention}.to_v.weight", (inner, source)
            yield from _layer(f"{block}.{attention}.to_out.0", (inner, inner))
        yield from _layer(f"{block}.ff.net.0.proj", (8 * inner, inner))  # GEGLU: twice 4
        yield from _layer(f"{block}.ff.net.2", (inner, 4 * inner))
        for norm in ("norm1", "norm2", "norm3"):
            yield from _norm(f"{block}.{norm}", inner)
    yield from _layer(f"{name}.proj_out", (channels, inner, 1, 1))


def first_stage_shapes(stage: LdmFirstStage) -> dict[str, Shape]:
    """Name -> shape of every tensor of the autoencoder, with ``FIRST_STAGE_PREFIX``."""
    shapes = dict(_first_stage_shapes(stage))
    return {f"{FIRST_STAGE_PREFIX}{name}": shape for name, shape in shapes.items()}


def _first_stage_shapes(stage: LdmFirstStage) -> Iterator[tuple[str, Shape]]:
    widths = stage.block_out_channels
    levels, double = len(widths), 2 if stage.kind == "kl" else 1
    channels = stage.channels
    yield from _layer("encoder.conv_in", (channels, stage.in_channels, 3, 3))
    for level, width in enumerate(widths):
        for layer in range(stage.num_res_blocks):
            yield from _plain_residual(f"encoder.down.{level}.block.{layer}", channels, width)
            channels = width
            if stage.attention[level]:
                yield from _plain_attention(f"encoder.down.{level}.attn.{layer}", channels)
        if level < levels - 1:
            name = f"encoder.down.{level}.downsample.conv"
            yield from _layer(name, (channels, channels, 3, 3))
    yield from _middle("encoder.mid", channels)
    yield from _norm("encoder.norm_out", channels)
    yield from _layer("encoder.conv_out", (double * stage.z_channels, channels, 3, 3))
    yield from _layer("decoder.conv_in", (channels, stage.z_channels, 3, 3))
    yield from _middle("decoder.mid", channels)
    for level, width in reversed(list(enumerate(widths))):
        for layer in range(stage.num_res_blocks + 1):
            yield from _plain_residual(f"decoder.up.{level}.block.{layer}", channels, width)
            channels = width
            if stage.attention[level]:
                yield from _plain_attention(f"decoder.up.{level}.attn.{layer}", channels)
        if level:
            name = f"decoder.up.{level}.upsample.conv"
            yield from _layer(name, (channels, channels, 3, 3))
    yield from _norm("decoder.norm_out", channels)
    yield from _layer("decoder.conv_out", (stage.out_channels, channels, 3, 3))
    if stage.kind == "vq":
        yield "quantize.embedding.weight", (stage.codes, stage.embed_dim)
    before, after = double * stage.z_channels, double * stage.embed_dim
    yield from _layer("quant_conv", (after, before, 1, 1))
    yield from _layer("post_quant_conv", (stage.z_channels, stage.embed_dim, 1, 1))


def _middle(name: str, channels: int) -> Iterator[tuple[str, Shape]]:
    yield from _plain_residual(f"{name}.block_1", channels, channels)
    yield from _plain_attention(f"{name}.attn_1", channels)
    yield from _plain_residual(f"{name}.block_2", channels, channels)


def _plain_residual(name: str, before: int, after: int) -> Iterator[tuple[str, Shape]]:
    yield from _norm(f"{name}.norm1", before)
    yield from _layer(f"{name}.conv1", (after, before, 3, 3))
    yield from _norm(f"{name}.norm2", after)
    yield from _layer(f"{name}.conv2", (after, after, 3, 3))
    if before != after:
        yield from _layer(f"{name}.nin_shortcut", (after, before, 1, 1))


def _plain_attention(name: str, channels: int) -> Iterator[tuple[str, Shape]]:
    yield from _norm(f"{name}.norm", channels)
    for projection in ("q", "k", "v", "proj_out"):
        yield from _layer(f"{name}.{projection}", (channels, channels, 1, 1))


def conditioner_shapes(
    patch_embed_dim: int, region_embed_dim: int | None, context_dim: int
) -> dict[str, Shape]:
    """Name -> shape of ``PatchEmbedder`` or, with a region, ``SSLEmbedder``."""
    shapes = dict(_layer(f"{CONDITIONER_PREFIX}patch_fc", (context_dim, patch_embed_dim)))
    if region_embed_dim is not None:
        shapes.update(_layer(f"{CONDITIONER_PREFIX}region_fc", (context_dim, region_embed_dim)))
    return shapes


@dataclass(frozen=True, kw_only=True)
class LdmGridConditioner:
    """Arguments of ZoomLDM's ``EmbeddingViT2_5``; the defaults are those of the published model.

    Attributes:
        input_channels: Of an embedding.
        channels: Of the transformer and of a token.
        num_layers: Its blocks.
        num_heads: Attention heads of a block.
        mlp_dim: Hidden width of a block's MLP.
        cells: Of the grid of embeddings.
        magnifications: How many it knows.
    """

    input_channels: int = 1024
    channels: int = 512
    num_layers: int = 12
    num_heads: int = 8
    mlp_dim: int = 2048
    cells: int = 64
    magnifications: int = 8


def grid_conditioner_shapes(grid: LdmGridConditioner) -> dict[str, Shape]:
    """Name -> shape of ``EmbeddingViT2_5``, whose transformer is torchvision's ``Encoder``."""
    prefix, width = CONDITIONER_PREFIX, grid.channels
    shapes: dict[str, Shape] = {
        f"{prefix}mag_embedding.weight": (grid.magnifications, width),
        f"{prefix}pad_token": (1, 1, width),
        f"{prefix}encoder.pos_embedding": (1, grid.cells + 1, width),
    }
    shapes.update(_layer(f"{prefix}dim_reduce", (width, grid.input_channels)))
    for index in range(grid.num_layers):
        layer = f"{prefix}encoder.layers.encoder_layer_{index}"
        shapes.update(_norm(f"{layer}.ln_1", width))
        shapes[f"{layer}.self_attention.in_proj_weight"] = (3 * width, width)
        shapes[f"{layer}.self_attention.in_proj_bias"] = (3 * width,)
        shapes.update(_layer(f"{layer}.self_attention.out_proj", (width, width)))
        shapes.update(_norm(f"{layer}.ln_2", width))
        shapes.update(_layer(f"{layer}.mlp.0", (grid.mlp_dim, width)))
        shapes.update(_layer(f"{layer}.mlp.3", (width, grid.mlp_dim)))
    shapes.update(_norm(f"{prefix}encoder.ln", width))
    shapes.update(_layer(f"{prefix}final_proj", (width, width)))
    shapes.update(_norm(f"{prefix}layer_norm", width))
    return shapes


def _layer(name: str, weight: Shape) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", weight
    yield f"{name}.bias", weight[:1]


def _norm(name: str, channels: int) -> Iterator[tuple[str, Shape]]:
    yield from _layer(name, (channels,))
