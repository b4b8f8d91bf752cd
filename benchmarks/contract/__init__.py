"""What every part keeps to, whoever wrote it: promises that the tests and `edge-adapt contract` check alike."""
