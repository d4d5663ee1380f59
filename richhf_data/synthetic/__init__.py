"""RichHF-Synth: an endless, built-in benchmark modelled on RichHF-18K.

A grammar writes a prompt; a renderer draws it with the errors of an image generator; three simulated annotators mark what
they see; and their annotations are consolidated like real ones. All errors of a picture are known exactly, and so is the
best result that a model can reach. `python -m richhf_data.synthetic` writes the benchmark in the published formats.
Imports no TensorFlow.
"""

from richhf_data.synthetic.example import (
    Example,
    draw,
    draw_captioned,
    draw_prompt,
    examples,
    kept_index,
    scenes,
    train_prompts,
)

__all__ = ["Example", "draw", "draw_captioned", "draw_prompt", "examples", "kept_index", "scenes", "train_prompts"]
