// Many small dependent jobs in one parallel region.
//
// A job (a layer of a network) runs through stages; a stage is cut into tasks that may run at the same time;
// a stage begins when the one before it is finished. Starting a parallel region per job and stage would cost
// more than a small layer's work, and barriers would leave threads idle, so all tasks of all jobs stand in
// one queue, ordered such that everything a task waits for stands before it:
//
//     job 0 stage 0 | job 1 stage 0, job 0 stage 1 | job 2 stage 0, job 1 stage 1, job 0 stage 2 | ...
//
// Threads take tickets in that order. A task waits (spinning) until its stage may begin; whatever it waits
// for has been taken by a thread that is running it, so there is no deadlock with any number of threads,
// and the waits are short because other jobs' tasks stand in between. The last task to finish a stage runs
// the stage's `finish`, where partial results are added up in a fixed order.
//
// A small job (one that fits into a core's own cache) is a single ticket: one thread takes it through all its
// stages while it is warm. Small jobs stand last, where they fill up what the large ones leave uneven.
//
// Work provides:
//   int64_t workers()                 the number of threads that its size is worth
//   bool small(job)
//   int64_t tasks(job, stage)         1 or more
//   void task(job, stage, index)
//   void finish(job, stage)
// These must not throw, so not allocate: whoever waits for an unfinished stage would wait forever.
#pragma once

#include <sched.h>

#include <cstdint>

#include "common.h"
#include "parallel.h"

namespace gankern {

template <class Work>
void run_staged(const Parallel& parallel, Work& work, int64_t jobs, int64_t stages) {
  struct Stage {
    int64_t first_ticket, tasks, job, stage;  // stage is -1 for all stages of a small job
    int64_t done;                             // tasks finished
    int32_t ready;                            // finish() has returned
  };
  const int64_t count = jobs * stages;
  if (count == 0) return;
  const GANKERN_ISA::Scratch<Stage> queue_of(count);
  const GANKERN_ISA::Scratch<Stage*> of_of(count);
  Stage* queue = queue_of.at;
  Stage** of = of_of.at;  // [job][stage]
  int64_t tickets = 0, filled = 0;
  for (int64_t wave = 0; wave < jobs + stages - 1; ++wave) {
    for (int64_t stage = 0; stage < stages; ++stage) {
      const int64_t job = wave - stage;
      if (job < 0 || job >= jobs || work.small(job)) continue;
      const int64_t tasks = work.tasks(job, stage);
      queue[filled] = {tickets, tasks, job, stage, 0, 0};
      of[job * stages + stage] = &queue[filled++];
      tickets += tasks;
    }
  }
  for (int64_t job = 0; job < jobs; ++job) {
    if (work.small(job)) queue[filled++] = {tickets++, 1, job, -1, 0, 0};
  }

  int64_t next = 0;
  auto worker = [&](int64_t, int64_t) {
    int64_t at = 0;
    for (;;) {
      const int64_t ticket = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
      if (ticket >= tickets) return;
      while (ticket >= queue[at].first_ticket + queue[at].tasks) ++at;
      Stage& now = queue[at];
      if (now.stage < 0) {
        for (int64_t stage = 0; stage < stages; ++stage) {
          for (int64_t task = 0; task < work.tasks(now.job, stage); ++task) work.task(now.job, stage, task);
          work.finish(now.job, stage);
        }
        continue;
      }
      if (now.stage > 0) {
        const Stage& before = *of[now.job * stages + now.stage - 1];
        for (int spins = 0; !__atomic_load_n(&before.ready, __ATOMIC_ACQUIRE); ++spins) {
#if defined(__x86_64__)
          __builtin_ia32_pause();
#endif
          if (spins > 1000) sched_yield();  // more threads than processors: let the other one finish
        }
      }
      work.task(now.job, now.stage, ticket - now.first_ticket);
      if (__atomic_add_fetch(&now.done, 1, __ATOMIC_ACQ_REL) == now.tasks) {
        work.finish(now.job, now.stage);
        __atomic_store_n(&now.ready, 1, __ATOMIC_RELEASE);
      }
    }
  };
  int64_t workers = parallel.threads < tickets ? parallel.threads : tickets;
  if (work.workers() < workers) workers = work.workers();
  parallel_for(parallel, workers, 1, worker);
}

}  // namespace gankern
