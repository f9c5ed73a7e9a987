"""recontrol: an OpenAI-compatible server that aligns a frozen language model while it decodes."""
