"""The outputs of merges: staging folder, manifest, card, verification, signatures, publishing on the Hub."""
