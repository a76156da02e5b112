"""The DeepSpeed room: nothing outside it calls DeepSpeed's engine or knows how weights are sharded."""
