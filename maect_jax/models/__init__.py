"""Network modules: encoder, decoder, contrastive head."""
