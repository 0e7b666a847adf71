"""What a merge leaves: staging folder, manifest, card, verification, signatures, publishing on the Hub."""
