"""What both RL stages share: phases, updates, and the policies of image sampling."""
