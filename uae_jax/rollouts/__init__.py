"""What a policy does: groups of captions on a shared prefix, images by ODE and SDE."""
