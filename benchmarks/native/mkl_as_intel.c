/* MKL asks this function whether the processor is Intel's, and uses slower kernels elsewhere. Preloaded, it says yes. */
int mkl_serv_intel_cpu_true(void) { return 1; }
