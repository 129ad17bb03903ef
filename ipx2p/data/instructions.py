"""What to say for each task (layer 2)."""

# One sentence per task, those of "Instruction-tuning Stable Diffusion with InstructPix2Pix".
INSTRUCTIONS = {
    "denoise": "denoise the noisy image",
    "enhance": "enhance the low-light image",
}
