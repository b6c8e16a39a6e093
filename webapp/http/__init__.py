"""The filters between the network and the app."""
