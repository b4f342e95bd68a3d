--- @include lib/basics/numbers
--- @include lib/lease/read_run

-- Reset the retries and other counts of a request that has made progress: it stepped for at least 1 s, and its
-- checkpoint is further than the best of all earlier executions. Without the second of stepping, a request that crashes
-- its worker after one more output each time would never become a dead letter. job, point: of read_run() and
-- read_best(). Returns whether it has moved by more than one checkpoint, or for 1 s.
local function credit_progress(job, point, claimed_ms)
  if number_of(point.at) < claimed_ms then return false end
  local offset, seq = number_of(point.offset), number_of(point.seq)
  local best_offset, best_seq = number_of(job.best_offset), number_of(job.best_seq)
  -- Compare outputs; the number of the checkpoint counts only where there are none.
  if offset <= best_offset and (offset > 0 or seq <= best_seq) then return false end
  change(job, 'best_offset', int(math.max(offset, best_offset)))
  change(job, 'best_seq', int(math.max(seq, best_seq)))
  -- A worker of an older release does not write `stepped`, and leaves that of an earlier checkpoint: then the time
  -- since the claim counts, with the loading of the model in it.
  local which, ms = string.match(point.stepped or '', '^(%d+):(%d+)$')
  local stepped = which == point.seq and tonumber(ms) or number_of(point.at) - claimed_ms
  if stepped >= 1000 then
    change(job, 'retries_left', job.max_retries or '0')
    change(job, 'executions', '0')
    change(job, 'losses', '0')
    change(job, 'crashes', '0')
    change(job, 'waits', '0')
    change(job, 'raised', '0')
  end
  return seq - best_seq > 1 or stepped >= 1000
end
