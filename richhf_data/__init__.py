"""RichHF data: records, images, annotators, seqio tasks and the papers' metrics. No model code."""
