"""The benchmark: this server's engine and its peers on the same model, prompts, precision and sampling, turn by turn.

Every program runs in a process of its own, and is frozen while another one is measured. Only `server.cli` imports this
package. Enter at `offline.measure` (tokens a second, no HTTP) and `online.measure` (streams over HTTP at a rate).
"""
