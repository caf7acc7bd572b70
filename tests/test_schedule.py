"""The noise schedule and the forward process."""

import pytest
import torch
from diffusers import DDPMScheduler

from pathsegdiff.diffusion.schedule import NoiseSchedule, add_noise, check_timestep
from pathsegdiff.errors import ConfigError

#: facts: alphas_cumprod of the paper's model
PAPER = {0: 0.9985, 1: 0.996994427069975, 50: 0.9166874224337891, 999: 0.00014230397519201775}


@pytest.mark.parametrize("timestep", PAPER)
def test_the_default_schedule_is_the_papers(timestep):
    alphas = NoiseSchedule().alphas_cumprod()
    assert len(alphas) == 1000
    assert alphas[timestep].item() == pytest.approx(PAPER[timestep], rel=1e-9)


@pytest.mark.parametrize("name", ["scaled_linear", "linear", "squaredcos_cap_v2"])
def test_every_schedule_is_the_one_that_diffusers_calls_so(name):
    scheduler = DDPMScheduler(
        num_train_timesteps=400, beta_schedule=name, beta_start=0.001, beta_end=0.02
    )
    ours = NoiseSchedule(beta_schedule=name, beta_start=0.001, beta_end=0.02, timesteps=400)
    torch.testing.assert_close(
        ours.alphas_cumprod().float(), scheduler.alphas_cumprod, rtol=2e-5, atol=1e-9
    )


@pytest.mark.parametrize("timestep", [0, 50, 999])
def test_add_noise_matches_diffusers(timestep, generator):
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.0015, beta_end=0.0195)
    latent, noise = torch.randn(2, 2, 3, 8, 8, generator=generator)
    expected = scheduler.add_noise(latent, noise, torch.tensor([timestep]))
    torch.testing.assert_close(
        add_noise(latent, noise, timestep, scheduler.alphas_cumprod), expected
    )


def test_a_little_noise_survives_bfloat16(generator):
    noise = torch.randn(1, 3, 8, 8, generator=generator)
    clean = torch.zeros(1, 3, 8, 8, dtype=torch.bfloat16)
    noised = add_noise(clean, noise, 0, NoiseSchedule().alphas_cumprod())
    assert noised.dtype == torch.bfloat16
    torch.testing.assert_close(noised.float(), 0.0015**0.5 * noise, rtol=0.02, atol=1e-4)


def test_noise_of_another_shape_or_time_is_a_mistake_of_the_caller():
    alphas = NoiseSchedule().alphas_cumprod()
    with pytest.raises(ValueError, match=r"noise has shape \(1, 3, 4, 4\), latent \(1, 3, 8, 8\)"):
        add_noise(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 4, 4), 0, alphas)
    with pytest.raises(ValueError, match=r"timestep must be in \[0, 999\], got 1000"):
        add_noise(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8), 1000, alphas)


@pytest.mark.parametrize("timestep", [-1, 1000])
def test_a_time_outside_the_schedule_names_the_range(timestep):
    with pytest.raises(ConfigError, match=rf"t must be in \[0, 999\].*got {timestep}"):
        check_timestep(timestep, 1000)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta_schedule": "sigmoid"}, "must be one of scaled_linear"),
        ({"timesteps": 0}, "1 to 100000 timesteps, got 0"),
        ({"beta_start": 0.5, "beta_end": 0.1}, "betas must rise"),
        ({"beta_end": 1.0}, "betas must rise"),
    ],
)
def test_an_impossible_schedule_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        NoiseSchedule(**settings)
