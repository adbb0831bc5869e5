#!/usr/bin/env bash
# diffusers: add_noise() casts its schedule to the picture's type: no noise at all in bfloat16's first ten steps, nothing but noise for bytes.
#
# Guess:   DDPMScheduler.add_noise(x, noise, t) gives sqrt(a) x + sqrt(1 - a) noise with a from the schedule's float32 table; bfloat16 rounds
#          the sum; a picture of bytes is refused or converted.
# Seen:    the table itself is cast to the type of x before 1 - a is taken. bfloat16 has no number between 0.996 and 1: up to t = 9 the
#          "noised" picture equals the clean one bit for bit, at t = 10 the noise is a third too strong. With bytes (uint8) every a is cut
#          to 0: the result is pure noise at every step and the picture is gone. No error, no warning.
# Matters: the lesion noise of visual preference pairs is this very formula. A pair whose two pictures are equal teaches nothing; one with
#          a blotted-out picture teaches that any picture is better than none.
# Versions: diffusers 0.42.1, torch 2.13.0, numpy 2.3.5, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.3.5 diffusers==0.42.1 2>/dev/null
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PYTHON'
import diffusers
import torch
from diffusers import DDPMScheduler

print("diffusers", diffusers.__version__, "torch", torch.__version__)
generator = torch.Generator().manual_seed(0)
picture = torch.rand(1, 1, 256, 256, generator=generator)
noise = torch.randn(picture.shape, generator=generator)


def strength(picture, step):
    """Factors of picture and noise in the noised picture, by least squares, and whether it is the clean one."""
    clean, added = picture.float(), noise.to(picture.dtype if picture.is_floating_point() else torch.float32)
    noised = DDPMScheduler().add_noise(picture, added, torch.tensor([step]))
    basis = torch.stack([clean.flatten(), added.flatten()], 1).double()
    signal, factor = torch.linalg.lstsq(basis, noised.double().flatten()[:, None]).solution.flatten().tolist()
    return signal, factor, bool((noised == picture).all())


table = DDPMScheduler().alphas_cumprod
print("bfloat16:")
for step in (0, 5, 9, 10, 15, 20, 50):
    expected = (1 - table[step]).sqrt().item()
    _, factor, unchanged = strength(picture.bfloat16(), step)
    print(f"  t = {step}: expected strength {expected:.4f}, seen {factor:.4f}{', the picture is unchanged' if unchanged else ''}")
    assert unchanged == (step < 10)
    assert step != 10 or factor > 1.3 * expected
    assert abs(strength(picture, step)[1] - expected) < 1e-4, "float32 is right"

print("bytes:")
for step in (5, 100):
    expected = table[step].sqrt().item()
    signal, factor, _ = strength((picture * 255).to(torch.uint8), step)
    print(f"  t = {step}: expected share of the picture {expected:.3f}, seen {abs(signal):.3f}; strength of the noise {factor:.3f}")
    assert abs(signal) < 1e-3 and abs(factor - 1) < 1e-3
PYTHON
