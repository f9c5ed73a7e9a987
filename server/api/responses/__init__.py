"""POST /v1/responses, OpenAI's newer route, without a memory: nothing is stored, and a conversation is given whole.

Only its shapes are here: what comes in (`body`, `input`) and what goes out (`answer`, and `output` with the events that
tell how it grows). Everything below is what chats run on. Enter at `route`.
"""
