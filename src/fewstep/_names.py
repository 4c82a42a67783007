"""What our solvers are called elsewhere, and what is known to be wrong there.

diffusers: scheduler class and the settings that make it this method. k-diffusion: function.
ComfyUI: sampler name in KSampler, or a node of custom sampling. Read in their sources (diffusers of
August 2026, k-diffusion of February 2026, ComfyUI of 2026); where there is no name, none was found.
The same formula is meant, on the same levels: each code base has its own grids and its own end.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["NAMES", "Names"]


@dataclass(frozen=True)
class Names:
    """Names of one solver in other code, and warnings about that code."""

    diffusers: tuple[str, ...] = ()
    k_diffusion: tuple[str, ...] = ()
    comfyui: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


_MULTI = "DPMSolverMultistepScheduler"
#: What `lower_order_final`, on by default, does in DPMSolverMultistepScheduler and DEIS.
_FINAL = (
    "diffusers: below 15 steps the last step is first order, the one before at most second "
    "(lower_order_final)"
)
#: k-diffusion's samplers were written for x / alpha; on a flow its sigma is not sigma / alpha.
_FLOW = (
    "ComfyUI: on flow models the clock of this sampler is -log sigma of the flow, not lambda = "
    "log((1 - sigma) / sigma): another method of the same order there"
)
_NO_ZERO = 'diffusers: "dpmsolver" refuses final_sigmas_type="zero"; set "sigma_min"'


def _dpm(algorithm: str, order: int, kind: str) -> str:
    kind = f', solver_type="{kind}"' if order == 2 else ""
    return f'{_MULTI}(algorithm_type="{algorithm}", solver_order={order}{kind})'


def _unipc(order: int, kind: str) -> Names:
    comfyui = {"bh1": "uni_pc", "bh2": "uni_pc_bh2"}[kind] if order == 3 else ""
    notes = ("ComfyUI: ends at sigma = 0.001 where the grid says 0",) if comfyui else ()
    return Names(
        (f'UniPCMultistepScheduler(solver_order={order}, solver_type="{kind}")',),
        (),
        (comfyui,) if comfyui else (),
        notes,
    )


def _lms(order: int) -> Names:
    notes = ("everywhere: the numbers are integrated numerically (scipy quad, to 1e-4)",)
    if order > 2:
        notes += (
            "ComfyUI: ipndm_v is meant to be this from order 3 on, but a misplaced parenthesis "
            "makes it second order on unequal steps",
        )
    return Names(
        (f"LMSDiscreteScheduler, step(..., order={order})",),
        (f"sample_lms(order={order})",),
        ("lms",) if order == 4 else (),
        notes,
    )


#: By registry name.
NAMES: dict[str, Names] = {
    "ddim": Names(
        (
            "DDIMScheduler (eta=0)",
            "EulerDiscreteScheduler",
            "FlowMatchEulerDiscreteScheduler",
            f"{_MULTI}(solver_order=1)",
        ),
        ("sample_euler (s_churn=0)",),
        ("euler", "ddim"),
        ("diffusers: DDIMScheduler clips data predictions to [-1, 1] unless clip_sample=False",),
    ),
    "dpmpp_2m": Names(
        (_dpm("dpmsolver++", 2, "midpoint"),),
        ("sample_dpmpp_2m", 'sample_dpmpp_2m_sde(eta=0, solver_type="midpoint")'),
        ("dpmpp_2m", 'node SamplerDPMPP_2M_SDE(eta=0, solver_type="midpoint")'),
        (_FINAL, _FLOW),
    ),
    "dpmpp_2m_heun": Names(
        (_dpm("dpmsolver++", 2, "heun"),),
        ('sample_dpmpp_2m_sde(eta=0, solver_type="heun")',),
        ("res_multistep", 'node SamplerDPMPP_2M_SDE(eta=0, solver_type="heun")'),
        (_FINAL, _FLOW.replace("this sampler", "res_multistep")),
    ),
    "dpmpp_3m_shipped": Names(
        (_dpm("dpmsolver++", 3, ""),),
        ("sample_dpmpp_3m_sde(eta=0)",),
        ("node SamplerDPMPP_3M_SDE(eta=0)",),
        (
            _FINAL,
            "everywhere: the second-derivative term has half its weight, which makes the method "
            "second order; dpmpp_3m is the one with the whole weight",
        ),
    ),
    "dpmpp_3m": Names(
        notes=("no other code has it: what they call 3M is dpmpp_3m_shipped, of second order",)
    ),
    "dpm_solver_2m": Names((_dpm("dpmsolver", 2, "midpoint"),), notes=(_FINAL, _NO_ZERO)),
    "noise_ab2": Names(
        ("DEISMultistepScheduler(solver_order=2)", _dpm("dpmsolver", 2, "heun")),
        notes=(_FINAL, _NO_ZERO),
    ),
    "noise_ab3": Names(
        ("DEISMultistepScheduler(solver_order=3)",),
        notes=(
            _FINAL,
            "diffusers: this DEIS interpolates in log rho (= -lambda), not in t as the paper's tAB",
        ),
    ),
    **{f"unipc_{p}": _unipc(p, "bh2") for p in (1, 2, 3)},
    **{f"unipc_{p}_bh1": _unipc(p, "bh1") for p in (1, 2, 3)},
    "deis_tab2": Names(
        comfyui=("deis",),
        notes=(
            "ComfyUI: interpolates in the t of a VP process fitted to sigma = 0.002 .. 80, not in "
            "the model's own t",
        ),
    ),
    **{f"deis_rhoab{p - 1}": _lms(p) for p in (2, 3, 4)},
    "ipndm_4": Names(
        ("IPNDMScheduler (for v-predicting networks on its own sine path only)",),
        (),
        ("ipndm",),
        ("ComfyUI: the step to sigma = 0 is DDIM there",),
    ),
    "heun": Names(
        ("HeunDiscreteScheduler",),
        ("sample_heun (s_churn=0)",),
        ("heun",),
        ("everywhere: counts steps, not evaluations: about two for each",),
    ),
    "dpm_solver_2": Names(
        ('DPMSolverSinglestepScheduler(algorithm_type="dpmsolver", solver_order=2)',),
        ("sample_dpm_2 (s_churn=0)",),
        ("dpm_2",),
        (_FLOW,),
    ),
    "dpmpp_2s": Names(
        ('DPMSolverSinglestepScheduler(algorithm_type="dpmsolver++", solver_order=2)',),
        ("sample_dpmpp_2s_ancestral(eta=0)",),
    ),
    "etd2rk": Names(comfyui=("exp_heun_2_x0",)),
}
