"""The filter between the network and Gradio."""
