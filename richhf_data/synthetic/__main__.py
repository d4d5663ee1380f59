"""Writes RichHF-Synth in the published formats: RichHF record files, and images in Pick-a-Pic-like parquet shards.

    python -m richhf_data.synthetic --output=DIR --train=10000 --dev=500 --test=500 --size=128 --seed=0

    DIR/{train,dev,test,test_novel}.tfrecord   as google-research-datasets/richhf-18k
    DIR/images/*.parquet                       columns caption, image_0_uid, image_1_uid, jpg_0, jpg_1
    DIR/references.json                        the ceiling and one annotator's result, by split
    DIR/statistics.json                        rater agreement, score means, empty maps; written last
"""

import tabulate
from absl import flags

from richhf_data import command, paths, ranges, schema
from richhf_data.synthetic import grammar
from richhf_data.synthetic.write import write

PAPER = {"all three raters equal": schema.RATERS_EQUAL, "within one point": schema.RATERS_WITHIN_ONE}
PAPER |= {"score mean": 0.633, "score deviation": 0.205}


def main():
    """The command."""
    args = flags.FLAGS
    novel = args.test if args.test_novel is None else args.test_novel
    counts = dict(zip(grammar.SPLITS, (args.train, args.dev, args.test, novel), strict=True))
    counts = {split: count for split, count in counts.items() if count}
    with paths.locked(args.output):
        figures = write(args.output, counts, args.size, args.seed, args.workers)
    rows = [(name, value, PAPER.get(name)) for name, value in figures.items()]
    print(tabulate.tabulate(rows, headers=("", "RichHF-Synth", "paper"), floatfmt=".3f", missingval="-"))


if __name__ == "__main__":
    flags.DEFINE_string("output", None, "The folder to write.")
    ranges.flag("train", 10_000, "Training examples.", ranges.COUNT)
    ranges.flag("dev", 500, "Examples to develop with.", ranges.NUMBER)
    ranges.flag("test", 500, "Test examples.", ranges.NUMBER)
    ranges.flag("test_novel", None, "Test examples with colour-thing pairs that train lacks; as --test.", ranges.NUMBER)
    ranges.flag("size", 128, "Pixels of an image, both sides.", ranges.Range(16, 2**13, whole=True))
    ranges.flag("seed", 0, "Draws the examples.", ranges.SEED)
    ranges.flag("workers", None, "Processes; one per core by default.", ranges.PROCESSES)
    flags.mark_flag_as_required("output")
    command.run(main)
