"""WaveFT: a few trained coefficients, at random places, of the update's wavelet transform.

Bilican et al. 2025, "Exploring Sparsity for Parameter Efficient Fine Tuning Using Wavelets", arXiv 2505.12532:

    y = x Wᵀ + b + x ΔWᵀ        ΔW = scaling · T_Oᵀ S̃ T_I
    x [..., I]   W [O, I], frozen   S̃ [O, I], zero but for n_frequency entries   T_n [n, n], Haar's transform

ΔW is never formed: T costs an addition per feature, S̃ a multiplication per entry. The places are the first of
`torch.randperm(O · I)` with `random_loc_seed`, as PEFT draws them: modules of one shape share them, and they are in no
file. A torch that drew others would make another adapter of the same file, so its draw is checked first.

Init: the entries are 0, so that the model starts as its base; `init: gaussian` draws them from N(0, 0.01²).
Trainable per site: n_frequency.
Merge: W' = W + scaling · T_Oᵀ S̃ T_I.

Deviates from the paper: Haar's wavelet alone (db1), the authors' default. A side of odd length is refused: where it is
padded to an even one and the result cut, as in PEFT, some coefficients do nothing but what others do.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from peftcli.errors import ModelError
from peftcli.methods._place import Base, Site
from peftcli.methods._protocol import Method, Shared, Targets
from peftcli.ops import wavelet
from peftcli.ops.sparse import Places, dense, places, sparse_product

SEED, SIZE, DRAWN = 777, 960, (935, 63, 621, 188, 487, 902, 807, 861)
"""The first of what torch draws from that seed: the places that files leave out rest on it."""


class WaveFTConfig(Targets):
    """The fields of `method:` when `type: waveft`."""

    type: Literal["waveft"] = "waveft"
    n_frequency: int = Field(2592, ge=1, description="Trained coefficients in each module, at most its weights.")
    scaling: float = Field(25.0, gt=0, description="Factor on the update: tune it with the learning rate.")
    use_idwt: bool = Field(
        True, description="Whether the coefficients are the wavelet transform's; false trains single weights (SHiRA)."
    )
    random_loc_seed: int = Field(SEED, description="Decides the coefficients' places, whatever the training's seed.")
    init: Literal["zeros", "gaussian"] = Field("zeros", description="How the coefficients start.")


class WaveFT(Method):
    """The trained coefficients `spectrum` [n_frequency] of one site, and where they are."""

    Config = WaveFTConfig
    default_learning_rate = 1e-4  # a step of it moves four weights by half of `scaling` times as much
    peft_type = "WAVEFT"
    kinds = frozenset({"linear", "conv1d"})

    def __init__(self, config: WaveFTConfig, site: Site, seed: int, shared: Shared | None = None) -> None:
        super().__init__(config, site, seed, shared)
        self.scaling, self.use_idwt = config.scaling, config.use_idwt
        self.spectrum = nn.Parameter(initial_spectrum(config, site, seed).to(site.device))
        for name, tensor in _places_at(config, site)._asdict().items():
            self.register_buffer(name, tensor.to(site.device, copy=True), persistent=False)

    def places(self) -> Places:
        """Returns where S̃ has its entries; without the transform, where ΔW has them."""
        return Places(*(self.get_buffer(name) for name in Places._fields))

    def forward(self, base: Base, x: Tensor) -> Tensor:
        y: Tensor = base.forward(x)
        at = self.places()
        x_IT = x.reshape(-1, x.shape[-1]).to(self.spectrum.dtype).t()
        values = self.spectrum[at.order]
        if self.use_idwt:
            values = values * (self.scaling * wavelet.HALF_POWER)
            update_OT = wavelet.from_bands(sparse_product(values, wavelet.to_bands(x_IT), at))
        else:
            update_OT = sparse_product(values * self.scaling, x_IT, at)
        return y + update_OT.t().reshape(y.shape).to(y.dtype)

    def merged(self, weight: Tensor) -> Tensor:
        wide, at = torch.promote_types(weight.dtype, torch.float32), self.places()
        delta = dense(self.spectrum.to(wide)[at.order] * self.scaling, at)
        return (weight.to(wide) + (wavelet.inverse(delta) if self.use_idwt else delta)).to(weight.dtype)

    @classmethod
    def not_low_rank(cls, config: WaveFTConfig) -> str | None:
        return "its update has as many directions as the weight"

    @classmethod
    def check(cls, config: WaveFTConfig, sites: list[Site]) -> list[str]:
        problems = []
        for site in sites:
            if config.use_idwt and (site.in_features % 2 or site.out_features % 2):
                problems.append(
                    f"target_modules: {site.name} ({site.size}) has a side of odd length, which does not pair up into "
                    "Haar's wavelets; leave it out with exclude_modules, or set use_idwt: false"
                )
        for site in sites:
            most = site.in_features * site.out_features
            if config.n_frequency > most:  # one example says it; the others have the same cause
                return [*problems, f"n_frequency: {config.n_frequency} is more than the {most} weights of {site.name}"]
        return problems

    def peft_tensors(self) -> dict[str, Tensor]:
        return {"waveft_spectrum": self.spectrum}

    @classmethod
    def peft_config(cls, config: WaveFTConfig) -> dict[str, Any]:
        return {
            "n_frequency": config.n_frequency,
            "scaling": config.scaling,
            "use_idwt": config.use_idwt,
            "wavelet_family": "db1",
            "random_loc_seed": config.random_loc_seed,
            "init_weights": True,
            "bias": "none",
            "fan_in_fan_out": False,
        }

    @classmethod
    def config_from_peft(cls, fields: Mapping[str, Any]) -> WaveFTConfig:
        if fields["use_idwt"] and fields["wavelet_family"] != "db1":
            raise ValueError(f"wavelet_family: {fields['wavelet_family']}, of which this version has only db1 (Haar's)")
        names = ("n_frequency", "use_idwt", "random_loc_seed")
        read = {name: fields[name] for name in names}
        return WaveFTConfig.model_validate({**read, "scaling": float(fields["scaling"])})


def initial_spectrum(config: WaveFTConfig, site: Site, seed: int) -> Tensor:
    """Returns the start of the coefficients [n_frequency] in float32 on the CPU."""
    if site.device.type == "meta":
        return torch.empty(config.n_frequency, device="meta")
    if config.init == "gaussian":
        return 0.01 * torch.randn(config.n_frequency, generator=site.generator(seed))
    return torch.zeros(config.n_frequency)


def _places_at(config: WaveFTConfig, site: Site) -> Places:
    """Returns where the entries are, on the CPU; tensors of the right sizes where only shapes are wanted."""
    if site.device.type == "meta":
        p, m, n = config.n_frequency, site.out_features, site.in_features
        sizes = (p, p, p, m + 1, p, n + 1)
        return Places(*(torch.empty(size, dtype=torch.long, device="meta") for size in sizes))
    return random_places(
        site.out_features, site.in_features, config.n_frequency, config.random_loc_seed, exchanged=config.use_idwt
    )


@lru_cache(maxsize=64)  # a model has few shapes, and the draw takes 8 bytes and a second for 10⁸ weights
def random_places(m: int, n: int, count: int, seed: int, *, exchanged: bool) -> Places:
    """Returns `count` random places in a matrix [m, n], the same ones as PEFT; as in S̃ where `exchanged`."""
    if tuple(_permuted(SIZE, SEED)[: len(DRAWN)].tolist()) != DRAWN:
        raise ModelError(
            "method.type: this version of torch draws other places from a seed than those of waveft's files",
            hint="use the version of torch that the adapter was trained with",
        )
    drawn = _permuted(m * n, seed)[:count]
    rows, columns = drawn // n, drawn % n
    if exchanged:
        rows, columns = wavelet.exchanged(rows, columns, m, n)
    return places(rows, columns, m, n)


def _permuted(n: int, seed: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))
