"""Scripts that the measured processes run; see `losart.measure.footprint.processes`.

They find each other as modules of this folder, since the interpreter that runs `probe_transformers`
has no losart.
"""
