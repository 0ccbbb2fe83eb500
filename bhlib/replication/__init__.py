"""True of one model, or of the method: the same measurements on models that differ in seed, size, depth and pool.

    python -m bhlib.replication evaluate NAME FOLDER OUT    # a trained model: tables in OUT/NAME, minutes on a GPU
    python -m bhlib.replication gather OUT figures          # the tables of all models, for the figures

`models` has the models and the commands that train them, `subject` what is fitted on one, `evaluate` the measurements.
"""
