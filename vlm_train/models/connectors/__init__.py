"""From the patches of an image tower to tokens of a language model; the contract is that of `base.Connector`."""
