"""Quality against popularity, implicit ALS, RecTools SASRec and RecTools HSTU: `python -m benchmarks.quality`.

Protocol. Leave-one-out on every set: the last event of a user is the test, the one before it the validation case, the
rest trains; at most 10,000 validation users, drawn once. Retailrocket is asked its published next clicks besides
(`retailrocket-next`: sessions that nobody trained on). The whole catalogue is ranked by one function
(`elasticrec.evaluation.ranking.rank`) for all models, in their own environments too: same store, same split, same
filter (items seen before are no answers, except in the shop), same tie order, same newest `max_length` events.
Every model has the same budget of epochs, is validated after the same ones, stops after the same number of validations
without a new best, and is tested once, with the weights of its best validation NDCG@10. A peer with several settings
(`benchmarks.quality.models`) is tested with the one that validates best with the first seed; ours has one recipe.

Each job (set, model, setting, seed) is a process of its own; `--parallel N` runs N at a time. Finished jobs are kept
under `--work DIR`, so the same command goes on where it was stopped; `--deadline SECONDS` ends it in time to report.
A job is run again when its task changed (the configuration, not the code: take another DIR after changing that).

    python -m benchmarks.quality --quick                                    two minutes on two cores
    python -m benchmarks.quality --parallel 2 --json benchmarks/results/quality_HARDWARE.json
    python -m benchmarks.quality --models ours --sets ml-100k --seeds 1 --ours-override network.encoder.width=128

The peers' environment is made on first use under $ELASTICREC_CACHE (~/.cache/elasticrec); `--peers-python PATH` takes
another. A host without a registry: `benchmarks/peers/pack.sh`.
"""
