"""Names of the texts that a model can be calibrated or trained on, and of those that it is scored on."""

CALIBRATION_SETS = ("squad", "drop", "coqa", "wikitext2", "c4", "ptb", "redpajama", "text_file")
CORPORA = ("boolq", "lambada", "wikitext2", "c4", "ptb", "text_file")
