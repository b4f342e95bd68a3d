--- @include lib/basics/numbers
--- @include lib/basics/time
--- @include lib/lease/read_run

-- Write down why an execution was interrupted, for the worker that goes on (records.Interruption). Its last sign of
-- progress is its last checkpoint, or its claim. job, point: of read_run() and read_best(). taken: '1' if its worker
-- has not ended it itself.
local function interrupt(job, point, execution, worker, kind, claimed_ms, taken)
  local moved = math.max(claimed_ms, number_of(point.at))
  change(job, 'interrupted',
    table.concat({ kind, int(moved), int(now_ms), int(claimed_ms), taken or '0', execution, worker }, ' '))
end
