"""The language model evaluation harness (lm-eval) against a server, and its numbers beside transformers' own.

Enter at `agreement.measure`, or by `python -m tests.clients.lm_evaluation`.
"""

PROGRAM = "python -m tests.clients.lm_evaluation"
COMMAND = "tests.clients.lm_evaluation.command:LmEvaluation"
