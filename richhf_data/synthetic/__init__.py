"""RichHF-Synth: an endless, embedded benchmark in the likeness of RichHF-18K.

A prompt from a grammar, a picture drawn from it with a generator's errors, three annotators who mark what they see, and
the same consolidation as real annotations. What is wrong with each picture is known exactly, so the best result that
any model can reach is known too. `python -m richhf_data.synthetic --help` writes it in the published formats.
Imports no TensorFlow.
"""

from richhf_data.synthetic.example import Example, draw, draw_prompt, examples, train_prompts

__all__ = ["Example", "draw", "draw_prompt", "examples", "train_prompts"]
