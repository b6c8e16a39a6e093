"""What is between the network and Gradio."""
