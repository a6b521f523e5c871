"""The UNet of Stable Diffusion 1.x: noisy latents, a timestep and a text in; the predicted noise and the recorded
attention maps out.

Rombach et al. 2022, section 3.3. Module names are those of the folder format, so its weights load as they are.
Shapes: x [B,C,h,w] latents, emb [B,4*C0] activated time embedding, context [B,L,D] text.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import AttentionLayer, Edit, Hooks, Inputs, Maps, Record, attention
from .config import UNetConfig
from .norm import Fused, GroupNormSiLU, are_hooked, is_hooked
from .resample import Downsample, Upsample
from .sites import Place, Position, Site, Where
from .transformer import INPUT, TOKENS, Transformer

MASKED = "masked"
"""The input of an inpainting UNet [B,5,h,w]: the mask, 1 where to paint, and the latents of the masked picture."""

DEEP = Site("up", -1, -1, "self")
"""The key, among a pass's maps, of what its deep layers returned [B,C,h,w]. No attention layer has it."""
SHALLOW = 2
"""How many of the last layers run when that is reused, with as many of the first ones, conv_in among them."""


class Begun(NamedTuple):
    """A pass that its record ended, from where `UNet.finish` goes on.

    layer: the number of its last layer. kept, each with a row an image: what conv_in made; of the first layer's
    transformer and of the last one's, what it got and its tokens before they read the text; and the skip connections
    that are left. Detached.
    """

    layer: int
    kept: tuple[Tensor, ...]

    def row(self, i: int) -> "Begun":
        """That of one image."""
        return Begun(self.layer, tuple(x[i : i + 1] for x in self.kept))

    def joined(self, others: Sequence["Begun"]) -> "Begun":
        """One pass of this and others, which ended in the same layer."""
        if not others:
            return self
        kept = (self.kept, *(other.kept for other in others))
        return Begun(self.layer, tuple(map(torch.cat, zip(*kept, strict=True))))


class UNet(nn.Module):
    """`eps, maps = unet(x, t, context)`. `unet.sites` lists the attention layers in execution order."""

    attend = staticmethod(attention)
    distinct: Callable[[Tensor, Tensor], int] | None = None
    """How many rows of x and emb to compute: half, if the others are the same (speed/accelerate.py)."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        widths, emb = config.block_out_channels, 4 * config.block_out_channels[0]
        levels = len(widths)
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimeEmbedding(widths[0], emb)

        self.down_blocks = nn.ModuleList()
        skips = [widths[0]]  # channels of every skip connection, in the order of creation
        for i in range(levels):
            layers = config.layers_per_block[i]
            inputs = [skips[-1]] + [widths[i]] * (layers - 1)
            down = "downsamplers" if i < levels - 1 else None
            self.down_blocks.append(Block(config, "down", i, i, inputs, config.down_attention[i], down))
            skips += [widths[i]] * (layers + (down is not None))

        mid = Block(config, "mid", 0, levels - 1, [widths[-1]] * 2, True, None) if config.mid_block else None
        self.mid_block: Block | None = mid

        self.up_blocks = nn.ModuleList()
        channels = widths[-1]
        for i, level in enumerate(reversed(range(levels))):
            inputs = []
            for _ in range(config.layers_per_block[level] + 1):
                inputs.append(channels + skips.pop())
                channels = widths[level]
            up = "upsamplers" if i < levels - 1 else None
            self.up_blocks.append(Block(config, "up", i, level, inputs, config.up_attention[i], up))

        self.conv_norm_out = GroupNormSiLU(config.norm_num_groups, widths[0], config.norm_eps)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)
        self.sites: tuple[Site, ...] = tuple(m.site for m in self.modules() if isinstance(m, AttentionLayer))

    def forward(
        self,
        x: Tensor,
        t: Tensor | float,
        context: Tensor,
        record: Record | None = None,
        edits: Sequence[Edit] = (),
        inputs: Inputs | None = None,
        deep: Tensor | bool = False,
        at_stop: Callable[[Begun], None] | None = None,
    ) -> tuple[Tensor | None, Maps]:
        """Predict the noise (or v) in latents.

        x [B,C,h,w], variance-preserving (scaled by 1/sqrt(1+sigma^2)); t a number or [B], in training timesteps (0 to
        999); context [B,L,D].
        Returns (eps [B,C,h,w], maps). maps is empty without `record`; eps is None when `record.stop` ended the pass.
        inputs: tensors that keeps and edits read, on x's device; an inpainting UNet reads `MASKED` of them, or takes x
        with all its channels. deep: True also returns what the deep layers made, as maps[DEEP]; a later pass, for
        nearby latents, that is given it leaves these layers out (DeepCache, Ma et al. 2023). at_stop: gets what
        `finish` needs, where `record.stop` ended the pass after its first layer. ValueError if x or context has the
        wrong shape, or if `record` or `edits` name sites that this UNet does not have.
        """
        hooks = self._hooks(record, edits, inputs)
        x = self._with_masked(x, inputs)
        self._check(x, context)
        emb = self.time_embedding(self._timesteps(x, t).to(x.dtype))
        # what a pass leaves for another has a row an image
        y = self.conv_in(x[: self._rows(x, emb, hooks)] if at_stop is None else x)
        whole = y if len(y) == len(x) else torch.cat([y, y])
        if isinstance(deep, Tensor):
            return self._around(deep, y, whole, emb, context, hooks)
        found, maps = self._layers(0, None, y, [whole], emb, context, hooks, deep, at_stop)
        return (None if found is None else self._out(found)), maps

    def is_plain(self) -> bool:
        """Whether each layer does what its class here says, and only that: what `finish` needs."""
        ours = ("minidiff.", "torch.nn.")
        foreign = (is_hooked(layer) or not type(layer).__module__.startswith(ours) for layer in self.modules())
        return not (are_hooked() or any(foreign))

    @torch.no_grad()
    def finish(self, begun: Begun, t: Tensor | float, context: Tensor) -> Tensor:
        """Go on with a pass that a record ended, and if asked with one of another text for the same latents.

        t: the pass's, one for all rows. context [n,L,D]: its own; [2n,L,D]: the other text first. Returns eps [n,C,h,w]
        or [2n,C,h,w], as a whole pass does without record, edits and inputs, up to rounding. Only if `is_plain`.
        """
        hooks, (start, first, early, x, tokens, *skips) = self._hooks(None, (), None), begun.kept
        emb = self.time_embedding(self._timesteps(x[:1], t).to(x.dtype))
        y = self._read(begun.layer, x, tokens, context[-len(x) :], hooks)
        if len(context) > len(x):
            other, more = context[: -len(x)], [start]
            read = self._read(0, first, early, other, hooks)
            found, _ = self._layers(1, begun.layer + 1, read, more, emb, other, hooks)
            assert found is not None  # no stop
            y, skips = torch.cat([found, y]), [torch.cat(pair) for pair in zip(more, skips, strict=True)]
        found, _ = self._layers(begun.layer + 1, None, y, skips, emb, context, hooks)
        assert found is not None
        return self._out(found)

    def _read(self, number: int, x: Tensor, tokens: Tensor, context: Tensor, hooks: Hooks) -> Tensor:
        """What a layer makes of what its transformer got and the tokens, both from before it read the text."""
        block, i = self._order()[number]
        assert block.attentions is not None  # it made the tokens
        return cast(Transformer, block.attentions[i]).read(x, tokens, context, hooks)

    def _order(self) -> list[tuple["Block", int]]:
        """Blocks and their layers, as they run."""
        mid = () if self.mid_block is None else (self.mid_block,)
        blocks = cast("list[Block]", [*self.down_blocks, *mid, *self.up_blocks])
        return [(block, i) for block in blocks for i in range(len(block.resnets))]

    def _layers(
        self,
        start: int,
        end: int | None,
        y: Tensor,
        skips: list[Tensor],
        emb: Tensor,
        context: Tensor,
        hooks: Hooks,
        deep: bool = False,
        at_stop: Callable[[Begun], None] | None = None,
    ) -> tuple[Tensor | None, Maps]:
        """Some of the layers, by their order. y: what the one before made. skips: what was left, to which they add."""
        maps: Maps = {}
        first: Maps = {}
        order, begin = self._order(), [] if at_stop is None else skips[:1]
        for number, (block, i) in enumerate(order[start:end], start):
            if number > 0:
                last, at = order[number - 1]
                y = last.passed(at, y, skips)
            if deep and block is self.up_blocks[-1] and i == len(block.resnets) - SHALLOW:
                maps[DEEP] = y
            # The concatenation gets no name, so that the layer can free it.
            found, kept = block.layer(
                i, torch.cat([y, skips.pop()], dim=1) if block.place == "up" else y, emb, context, hooks
            )
            own = {key: kept.pop(key) for key in (INPUT, TOKENS) if key in kept}
            first = own if number == 0 else first
            maps.update(kept)
            if found is None:
                if at_stop is not None and number > 0 and first and own:
                    at_stop(Begun(number, tuple(x.detach() for x in (*begin, *first.values(), *own.values(), *skips))))
                return None, maps
            y = found
        return y, maps

    def _around(
        self, deep: Tensor, y: Tensor, whole: Tensor, emb: Tensor, context: Tensor, hooks: Hooks
    ) -> tuple[Tensor | None, Maps]:
        """The first and the last layers, around what the others returned earlier. y, whole: conv_in's output."""
        first, last = cast(Block, self.down_blocks[0]), cast(Block, self.up_blocks[-1])
        skip, maps = first.layer(0, y, emb, context, hooks)
        assert skip is not None  # no pass stops here
        found: Tensor | None = deep
        for i, other in zip(range(len(last.resnets) - SHALLOW, len(last.resnets)), (skip, whole), strict=True):
            assert found is not None
            found, kept = last.layer(i, torch.cat([found, other], dim=1), emb, context, hooks)
            maps = {**maps, **kept}
        assert found is not None
        return self._out(found), maps

    def _rows(self, x: Tensor, emb: Tensor, hooks: Hooks) -> int:
        """How many rows to begin with: with guidance the two halves are the same until a layer reads the text."""
        block = cast(Block, self.down_blocks[0])
        if self.distinct is None or block.attentions is None:
            return len(x)
        rows, first = self.distinct(x, emb), self.sites[0]
        if first in hooks.kinds or any(first in edit.sites for edit in hooks.edits):  # type: ignore[operator]
            return len(x)
        layers = (one for layer in (self.conv_in, block.resnets[0], block.attentions[0]) for one in layer.modules())
        return len(x) if rows < len(x) and (are_hooked() or any(map(is_hooked, layers))) else rows

    def _out(self, y: Tensor) -> Tensor:
        return self.conv_out(self.conv_norm_out(y))

    def is_deep(self, site: Site) -> bool:
        """Whether a pass leaves this attention layer out when it reuses what deep layers returned."""
        last = len(self.up_blocks) - 1
        first = len(cast(Block, self.up_blocks[-1]).resnets) - SHALLOW
        here = (site.place, site.block) == ("up", last) and site.layer >= first
        return not here and (site.place, site.block, site.layer) != ("down", 0, 0)

    def _with_masked(self, x: Tensor, inputs: Inputs | None) -> Tensor:
        """x with the mask and the masked picture behind it, where an inpainting UNet gets them as an input."""
        masked = (inputs or {}).get(MASKED)
        if masked is None or not self.config.inpaints:
            return x
        return torch.cat([x, masked.to(x.dtype).repeat(len(x) // len(masked), 1, 1, 1)], dim=1)

    def _timesteps(self, x: Tensor, t: Tensor | float) -> Tensor:
        t = t.to(x.device, torch.float32) if isinstance(t, Tensor) else torch.full((), t, device=x.device).float()
        t = t.expand(len(x))
        return sinusoids(t, self.config.block_out_channels[0], self.config.flip_sin_to_cos, self.config.freq_shift)

    def _hooks(self, record: Record | None, edits: Sequence[Edit], inputs: Inputs | None) -> Hooks:
        if record is not None:
            for sites in (record.sites, *(sites for sites, _ in record.more)):
                self._check_sites("record", sites)
        for edit in edits:
            self._check_sites("edit", edit.sites)
        kinds = {} if record is None else record.kinds
        stop = None
        if record is not None and record.stop:
            stop = [site for site in self.sites if site in kinds][-1]
        return Hooks(kinds, "all" if record is None else record.rows, tuple(edits), inputs or {}, stop, self.attend)

    def _check_sites(self, name: str, sites: frozenset[Site] | Where) -> None:
        if isinstance(sites, Where):
            raise ValueError(
                f"{name}.sites is {sites}; the UNet expects a set: frozenset(minidiff.sites(model, {sites}))"
            )
        if not sites.issubset(self.sites):
            wrong = sorted(site.name for site in sites.difference(self.sites))
            raise ValueError(f"{name}.sites holds {wrong}; expected some of {[site.name for site in self.sites]}")

    def positions(self, height: int, width: int) -> dict[Site, Position]:
        """The grid and the level of every site, for latents of h x w cells."""
        levels = len(self.config.block_out_channels)
        grids = [(height, width)]
        for _ in range(levels - 1):
            grids.append((-(-grids[-1][0] // 2), -(-grids[-1][1] // 2)))  # halving rounds up
        found = {}
        for site in self.sites:
            depth = site.block if site.place == "down" else levels - 1 - (site.block if site.place == "up" else 0)
            found[site] = Position(grids[depth], levels - 1 - depth)
        return found

    def _check(self, x: Tensor, context: Tensor) -> None:
        config = self.config
        if x.ndim != 4 or x.shape[1] != config.in_channels:
            raise ValueError(f"latents have shape {list(x.shape)}; expected [B, {config.in_channels}, h, w]")
        if context.ndim != 3 or len(context) != len(x) or context.shape[2] != config.cross_attention_dim:
            raise ValueError(
                f"context has shape {list(context.shape)}; expected [{len(x)}, L, {config.cross_attention_dim}]"
            )


class Block(nn.Module):
    """The layers of one level on one side: resnets, each followed by a transformer if `attention`, and at the end a
    change of resolution.

    `inputs` are the input channels of each resnet. The mid block has one transformer fewer than resnets.
    """

    def __init__(
        self,
        config: UNetConfig,
        place: Place,
        index: int,
        level: int,
        inputs: list[int],
        attention: bool,
        resample: str | None,
    ) -> None:
        super().__init__()
        self.place, out = place, config.block_out_channels[level]
        self.attentions: nn.ModuleList | None = None
        if attention:
            count = len(inputs) - (place == "mid")
            self.attentions = nn.ModuleList(Transformer(config, place, index, layer, level) for layer in range(count))
        self.resnets = nn.ModuleList(ResBlock(config, channels, out) for channels in inputs)
        self.downsamplers = nn.ModuleList([Downsample(out)]) if resample == "downsamplers" else None
        self.upsamplers = nn.ModuleList([Upsample(out)]) if resample == "upsamplers" else None

    def layer(self, i: int, x: Tensor, emb: Tensor, context: Tensor, hooks: Hooks) -> tuple[Tensor | None, Maps]:
        """Resnet i and the transformer after it, if there is one: (x, its maps); x is None if the pass ends here."""
        x = self.resnets[i](x, emb[: len(x)])
        if self.attentions is None or i == len(self.attentions):
            return x, {}
        return self.attentions[i](x, context, hooks)

    def passed(self, i: int, y: Tensor, skips: list[Tensor]) -> Tensor:
        """What layer i made, as the next layer gets it; adds to the skip connections."""
        if self.place == "down":
            skips.append(y)
        if i < len(self.resnets) - 1:
            return y
        if self.downsamplers is not None:
            y = cast(Tensor, self.downsamplers[0](y))
            skips.append(y)
        if self.upsamplers is not None:
            # Halving rounds up (65 -> 33), so the size comes from the skip connection, not from doubling.
            y = cast(Tensor, self.upsamplers[0](y, skips[-1].shape[-2:]))
        return y


class ResBlock(nn.Module):
    """Two 3x3 convolutions around the time embedding, and a shortcut."""

    fused: Fused = None

    def __init__(self, config: UNetConfig, channels: int, out: int) -> None:
        super().__init__()
        self.norm1 = GroupNormSiLU(config.norm_num_groups, channels, config.norm_eps)
        self.conv1 = nn.Conv2d(channels, out, 3, padding=1)
        self.time_emb_proj = nn.Linear(4 * config.block_out_channels[0], out)
        self.norm2 = GroupNormSiLU(config.norm_num_groups, out, config.norm_eps)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(channels, out, 1) if channels != out else None

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x [B,C,h,w], emb [B,4*C0] -> [B,C',h,w]."""
        return self.plain(x, emb) if self.fused is None else self.fused(self, x, emb)

    def plain(self, x: Tensor, emb: Tensor) -> Tensor:
        """The same, layer by layer."""
        y = self.conv1(self.norm1(x))
        y = y + self.time_emb_proj(emb)[:, :, None, None]
        y = self.conv2(self.norm2(y))
        return y + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class TimeEmbedding(nn.Module):
    """Turn sinusoids into the embedding that every resnet gets, already activated."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(channels, out)
        self.linear_2 = nn.Linear(out, out)

    def forward(self, x: Tensor) -> Tensor:
        """[B,C0] -> [B,4*C0]."""
        return F.silu(self.linear_2(F.silu(self.linear_1(x))))


def sinusoids(t: Tensor, channels: int, cos_first: bool = True, freq_shift: float = 0) -> Tensor:
    """Timesteps [B] -> float32 [B,channels]: cosines and sines of log-spaced frequencies (Vaswani et al. 2017, 3.5)."""
    half = channels // 2
    frequencies = torch.exp(
        torch.arange(half, dtype=torch.float32, device=t.device) * (-math.log(10000) / (half - freq_shift))
    )
    angles = t[:, None] * frequencies
    sin, cos = angles.sin(), angles.cos()
    waves = torch.cat([cos, sin] if cos_first else [sin, cos], dim=1)
    return F.pad(waves, (0, channels % 2))
