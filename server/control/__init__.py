"""The algorithm: objectives over value heads, and the edit of hidden states that follows from them."""
