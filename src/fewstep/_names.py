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
#: Fixed in no version looked at.
_THIRD = (
    'diffusers: "sde-dpmsolver++" of order 3 has a wrong sign, which makes it first order; never '
    "use it"
)
_SQUARED = "k-diffusion, ComfyUI: eta there is eta^2 of the SDE: 0.5 is half of the noise's power"
_TREE = (
    "k-diffusion, ComfyUI: their Brownian tree in sigma gives steps of different size the same "
    "path only asymptotically"
)
#: (Also the class LTXEulerAncestralRFScheduler of diffusers.)
_RF = (
    "ComfyUI: on flow models this sampler goes down to sigma_t^2 / sigma_s before it adds noise: "
    "another method there"
)
_CHURN = (
    "diffusers: step(s_churn=...) of EulerDiscreteScheduler and EDMEulerScheduler adds the noise "
    "after the network was asked, so that nothing removes it"
)
_DDPM = (
    "diffusers: DDPMScheduler adds noise to the sample itself where its last time is not 0 "
    '("trailing" spacing): the whole of beta with "fixed_large", 1e-20 with "fixed_small"'
)
_CLIP = "diffusers: clips data predictions to [-1, 1] unless clip_sample=False"
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
    # Stochastic: at their noise level, see `Solver.scaled`.
    "ddpm": Names(
        (
            "DDPMScheduler",
            "DDIMScheduler (eta=1)",
            "EulerAncestralDiscreteScheduler",
            _dpm("sde-dpmsolver++", 1, ""),
        ),
        ("sample_euler_ancestral",),
        ("euler_ancestral", "ddpm"),
        (_CLIP, _DDPM, _RF),
    ),
    "ddim_eta_0_5": Names(
        ("DDIMScheduler (eta=0.5)",),
        ("sample_euler_ancestral(eta=0.5)",),
        ("node SamplerEulerAncestral(eta=0.5)",),
        (_CLIP, _RF),
    ),
    "ddpm_large": Names(
        ('DDPMScheduler(variance_type="fixed_large")',),
        notes=(
            _CLIP,
            _DDPM,
            'diffusers: variance_type="fixed_large_log" takes the square root of a logarithm: NaN',
        ),
    ),
    "sde_dpmpp_2m": Names(
        (_dpm("sde-dpmsolver++", 2, "midpoint"), "CosineDPMSolverMultistepScheduler"),
        ("sample_dpmpp_2m_sde",),
        ("dpmpp_2m_sde",),
        (_FINAL, _SQUARED, _TREE),
    ),
    "sde_dpmpp_2m_heun": Names(
        (_dpm("sde-dpmsolver++", 2, "heun"),),
        ('sample_dpmpp_2m_sde(solver_type="heun")',),
        ("dpmpp_2m_sde_heun",),
        (_FINAL, _SQUARED, _TREE),
    ),
    "sde_dpmpp_3m": Names(
        notes=(
            "no other code has it: k-diffusion's 3M SDE is sde_dpmpp_3m_shipped, with half of the "
            "weight of the second difference",
            _THIRD,
        ),
    ),
    "sde_dpmpp_3m_shipped": Names(
        (),
        ("sample_dpmpp_3m_sde",),
        ("dpmpp_3m_sde",),
        (_SQUARED, _TREE, _THIRD),
    ),
    "sde_dpm_solver_1": Names((_dpm("sde-dpmsolver", 1, ""),), notes=(_NO_ZERO,)),
    "sde_dpm_solver_2m": Names((_dpm("sde-dpmsolver", 2, "midpoint"),), notes=(_FINAL, _NO_ZERO)),
    **{
        name: Names(
            (),
            (),
            (f"node SamplerSASolver(predictor_order={p}, corrector_order={c})",),
            (
                "diffusers, ComfyUI, official code: tau is a window of times by default, and is "
                "taken at one end of a step: the start in diffusers, the end in the others",
                "SASolverScheduler of diffusers and the official code for few steps rescale the "
                'first moment of two nodes (sa_solver(..., second="bh1")); this has exact weights',
                "official code: in float32 its weights of order 4 have two digits at short steps",
            ),
        )
        for name, p, c in (("sa_solver", 3, 4), ("sa_solver_2", 2, 2))
    },
    **{
        f"er_sde_{p}": Names(
            comfyui=("er_sde",) if p == 3 else (f"node SamplerER_SDE(max_stage={p})",),
            notes=("ComfyUI, official code: integrals are sums of 200 or 100 rectangles",) * (p > 1)
            + (
                "ComfyUI, official code: the first derivative is the last divided difference, "
                "which is second order also without noise",
            )
            * (p == 3),
        )
        for p in (1, 2, 3)
    },
    "lcm": Names(
        (
            "LCMScheduler",
            "FlowMatchLCMScheduler",
            "FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)",
        ),
        (),
        ("lcm",),
        (
            _CLIP,
            "diffusers: LCMScheduler puts a share of the state, 1 / (1 + 400 t^2), into the data "
            "prediction: the boundary condition of the distilled network",
        ),
    ),
    "tcd": Names(("TCDScheduler (eta=0.3)",)),
    "seeds_2": Names(comfyui=('node SamplerSEEDS2(solver_type="phi_2")',)),
    "seeds_3": Names(comfyui=("seeds_3",)),
    "sde_dpmpp_2s": Names(comfyui=("seeds_2",)),
    "dpmpp_sde": Names(
        ("DPMSolverSDEScheduler",),
        ("sample_dpmpp_sde",),
        ("dpmpp_sde",),
        (
            _TREE,
            "everywhere: eta is one for each step, as in DDIM; not the eta of dpmpp_2m_sde",
        ),
    ),
    "dpmpp_2s_ancestral": Names(
        (), ("sample_dpmpp_2s_ancestral",), ("dpmpp_2s_ancestral",), (_RF,)
    ),
    "dpm_2_ancestral": Names(
        ("KDPM2AncestralDiscreteScheduler",),
        ("sample_dpm_2_ancestral",),
        ("dpm_2_ancestral",),
        (_RF,),
    ),
    "edm_churn": Names(
        (),
        ("sample_heun(s_churn=5, s_tmin=0.05, s_tmax=50)",),
        (),
        (_CHURN,),
    ),
    "euler_churn": Names((), ("sample_euler(s_churn=5, s_tmin=0.05, s_tmax=50)",), (), (_CHURN,)),
    "pc_langevin": Names(
        notes=(
            "diffusers: ScoreSdeVeScheduler takes norms averaged over the batch, so that a sample "
            "depends on its neighbours, and its predictor is reverse diffusion; for that, "
            "fewstep.sample_corrected",
        )
    ),
}
