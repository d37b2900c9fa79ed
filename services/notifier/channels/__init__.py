"""The ways out: how a message reaches somebody who is not on the site."""
